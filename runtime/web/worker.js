// The group and its maps. Decodes, resizes, runs the models and writes files; the page (app.js) only shows.

import { Engine } from './engine.js'
import { Zip, png } from './files.js'
import { SIZE, levels, luma, resized, restoredRows } from './pixels.js'

const MAX_PIXELS = 1 << 26 // 67 megapixels, 268 MB decoded: larger photographs are scaled while they are decoded
const MAX_SIDE = 32767 // pixels; no browser draws a wider canvas
const MIN_SIDE = 2 // as in Python
const items = new Map() // by number: { name, file, sismFile, width, height, image, sism, sivs, map }
const engine = new Engine()
let started = false
let changed = false
let running = false
let shown = '' // the group whose maps are there

const breathe = () => new Promise((resolve) => setTimeout(resolve)) // lets messages in
const megapixels = (width, height) => Math.round((width * height) / 1e6)

/** A file decoded upright; a large one is scaled. */
async function decoded({ file, width, height }) {
  const scale = Math.min(1, Math.sqrt(MAX_PIXELS / (width * height)), MAX_SIDE / Math.max(width, height))
  const options = { imageOrientation: 'from-image', colorSpaceConversion: 'none' }
  if (scale < 1) Object.assign(options, { resizeWidth: Math.round(width * scale), resizeHeight: Math.round(height * scale), resizeQuality: 'high' })
  return createImageBitmap(file, options).catch(() => {
    throw new Error('damaged, or too large for this browser')
  })
}

/** The RGBA rows of a picture on a background; only a strip of them is in memory at a time. */
function* rowsOf(bitmap, behind) {
  const { width, height } = bitmap
  const strip = Math.min(height, Math.max(1, Math.floor((1 << 20) / width)))
  const context = new OffscreenCanvas(width, strip).getContext('2d', { willReadFrequently: true })
  context.fillStyle = behind
  for (let y = 0; y < height; y += strip) {
    context.fillRect(0, 0, width, strip)
    context.drawImage(bitmap, 0, -y)
    const { data } = context.getImageData(0, 0, width, Math.min(strip, height - y))
    for (let at = 0; at < data.length; at += 4 * width) yield data.subarray(at, at + 4 * width)
  }
}

function* greyRows(bitmap) {
  for (const row of rowsOf(bitmap, '#000')) yield luma(row)
}

async function readImage(item) {
  const { width, height } = item
  if (Math.min(width, height) < MIN_SIDE) throw new Error(`${width}×${height} pixels is too small; at least 2×2`)
  const bitmap = await decoded(item)
  Object.assign(item, { width: bitmap.width, height: bitmap.height })
  if (item.width !== width) {
    item.note = `${megapixels(width, height)} megapixels: scaled to ${item.width}×${item.height} while decoding; its files have that size`
  }
  const found = await resized(rowsOf(bitmap, '#fff'), item.width, item.height, { channels: 3, step: 4 })
  if (!item.sismFile && engine.sessions.detector) {
    item.sism = await engine.detected(rowsOf(bitmap, '#fff'), item.width, item.height)
  }
  item.image = found // last: an item with an image has been read
  bitmap.close()
}

async function readSism(item) {
  const bitmap = await decoded(item.sismFile)
  let highest = 0
  const watched = function* () {
    for (const row of greyRows(bitmap)) {
      for (let x = 0; x < row.length; x++) if (row[x] > highest) highest = row[x]
      yield row
    }
  }
  item.sism = await resized(watched(), bitmap.width, bitmap.height)
  bitmap.close()
  if (highest === 1) {
    item.sism = null
    throw new Error('its SISM has values 0 and 1 of 255, so nothing is salient; a mask must have 0 and 255')
  }
}

/** Computes whatever is missing; begins again when the group changes meanwhile. */
async function run() {
  changed = true
  if (running || !started) return
  running = true
  try {
    while (changed) {
      changed = false
      await pass()
    }
  } catch (error) {
    postMessage({ type: 'broken', message: error.message ?? String(error) })
  }
  running = false
}

const BEHIND = Symbol('the group has changed')

async function pass() {
  const all = [...items.values()]
  const unread = (item) => !item.image || (item.sismFile && !item.sism)
  let total = all.filter(unread).length + (engine.oneByOne ? 2 : 1) * all.length
  let done = engine.oneByOne ? all.filter((item) => item.sivs).length : 0
  const step = async (what, item, count = 1) => {
    postMessage({ type: 'progress', what: count > 1 ? `${what} of ${count} images at once` : `${what} of ${item.name}`, done, total })
    await breathe()
    if (changed) throw BEHIND
    done += count
  }
  try {
    for (const item of all.filter(unread)) {
      try {
        await step('Reading', item)
        if (!item.image) await readImage(item)
        if (item.sismFile && !item.sism) await readSism(item)
        postMessage({ type: 'read', id: item.id, image: item.image, sism: item.sism, width: item.width, height: item.height, note: item.note })
      } catch (error) {
        if (error === BEHIND) throw error
        items.delete(item.id)
        postMessage({ type: 'failed', id: item.id, message: error.message })
      }
    }
    const group = all.filter((item) => items.has(item.id) && item.image && item.sism)
    total -= (engine.oneByOne ? 2 : 1) * (all.length - group.length)
    const key = group.map((item) => `${item.id}.${item.version}`).join()
    if (group.length && key !== shown) {
      shown = ''
      const begin = performance.now()
      for await (const { item, map } of engine.maps(group, step)) {
        item.map = map
        postMessage({ type: 'map', id: item.id, map: levels(map) })
      }
      shown = key
      postMessage({ type: 'time', milliseconds: performance.now() - begin, images: group.length })
    }
    postMessage({ type: 'progress', what: '', done: 1, total: 1, images: group.length })
  } catch (error) {
    if (error !== BEHIND) throw error
  }
}

/** One of an image's results, as a PNG file of its own size. */
async function file(item, kind, level) {
  const { map, width, height } = item
  const grey = restoredRows(map, width, height)
  if (kind === 'map') return png(width, height, 1, grey)
  if (kind === 'mask') return png(width, height, 1, (function* () { for (const row of grey) yield row.map((v) => (v >= level ? 255 : 0)) })())
  const bitmap = await decoded(item)
  const cut = function* () {
    for (const row of rowsOf(bitmap, '#fff')) {
      const { value } = grey.next()
      for (let x = 0; x < width; x++) row[4 * x + 3] = value[x] >= level ? 255 : 0
      yield row
    }
  }
  const picture = await png(width, height, 4, cut())
  bitmap.close()
  return picture
}

const SUFFIX = { map: '', mask: '_mask', cutout: '_cutout' }
const FOLDER = { map: 'maps', mask: 'masks', cutout: 'cutouts' }

async function zip(kinds, level) {
  const archive = new Zip()
  const ready = [...items.values()].filter((item) => item.map)
  for (const [i, item] of ready.entries()) {
    postMessage({ type: 'progress', what: `Writing ${item.stem}`, done: i, total: ready.length })
    for (const kind of kinds) await archive.add(`${FOLDER[kind]}/${item.stem}.png`, await file(item, kind, level))
  }
  postMessage({ type: 'progress', what: '', done: 1, total: 1, images: ready.length })
  return archive.blob()
}

const on = {
  async start({ site, options }) {
    await engine.start(site, options, (what) => postMessage({ type: 'progress', what, done: 0, total: 0 }))
    started = true
    postMessage({ type: 'started', engine: engine.text, detector: Boolean(engine.sessions.detector) })
    await run()
  },
  add({ added }) {
    for (const item of added) items.set(item.id, { ...item, version: 0 })
    return run()
  },
  sism({ id, file, width, height }) {
    const item = items.get(id)
    if (item) Object.assign(item, { sismFile: { file, width, height }, sism: null, sivs: null, version: item.version + 1 })
    return run()
  },
  remove({ ids }) {
    for (const id of ids) items.delete(id)
    return run()
  },
  async save({ id, kind, level }) {
    const item = items.get(id)
    if (item?.map) postMessage({ type: 'file', name: `${item.stem}${SUFFIX[kind]}.png`, blob: await file(item, kind, level) })
  },
  async zip({ kinds, level }) {
    postMessage({ type: 'file', name: 'icnet.zip', blob: await zip(kinds, level) })
  },
}

onmessage = async ({ data }) => {
  try {
    await on[data.type](data)
  } catch (error) {
    postMessage({ type: data.type === 'start' ? 'broken' : 'message', message: error.message ?? String(error) })
  }
}
