// The page: takes files, shows what the worker (worker.js) computes, and saves it. Nothing is sent anywhere.

import { SIZE } from './pixels.js'

const $ = (id) => document.getElementById(id)
const HEIC = ['heic', 'heix', 'heim', 'hevc', 'hevx', 'mif1', 'msf1']
const SIMD = new Uint8Array([0, 97, 115, 109, 1, 0, 0, 0, 1, 5, 1, 96, 0, 1, 123, 3, 2, 1, 0, 10, 10, 1, 8, 0, 65, 0, 253, 15, 253, 98, 11])
const cards = new Map() // by number: { name, stem, element, image, map, hasSism }
const waiting = new Map() // SISMs whose photographs are not there yet, by stem
let worker
let next = 0
let detector = false
let began = 0

const stemOf = (name) => name.replace(/\.[^.]*$/, '')
const plural = (n, what) => `${n} ${what}${n === 1 ? '' : 's'}`

function say(message) {
  const line = document.createElement('p')
  line.textContent = message
  $('messages').append(line)
}

/** A file with its upright size in pixels; throws a reason where the browser can't read it. */
async function measured(file) {
  if (file.size === 0) throw new Error('the file is empty')
  const url = URL.createObjectURL(file)
  const picture = new Image()
  try {
    await new Promise((resolve, reject) => Object.assign(picture, { onload: resolve, onerror: reject, src: url }))
    return { file, width: picture.naturalWidth, height: picture.naturalHeight }
  } catch {
    const head = new TextDecoder('latin1').decode(await file.slice(4, 12).arrayBuffer().catch(() => new ArrayBuffer(0)))
    if (head.startsWith('ftyp') && HEIC.includes(head.slice(4))) {
      throw new Error('a HEIC photograph, which this browser can’t read: save it as JPEG, or use Safari')
    }
    throw new Error('not an image that this browser can read')
  } finally {
    URL.revokeObjectURL(url)
  }
}

/** The files that can be read, in order; each of the others gets a message. */
async function readable(files) {
  const found = await Promise.all([...files].map((file) => measured(file).catch((error) => say(`${file.name}: ${error.message}`))))
  return found.filter(Boolean)
}

async function addImages(files) {
  $('messages').replaceChildren()
  const taken = new Set([...cards.values()].map((card) => card.stem))
  const added = (await readable(files)).map(({ file, width, height }) => {
    let stem = stemOf(file.name)
    for (let n = 2; taken.has(stem); n++) stem = `${stemOf(file.name)}-${n}`
    taken.add(stem)
    const id = next++
    cards.set(id, { name: file.name, stem, element: makeCard(id, file.name), hasSism: false })
    return { id, name: file.name, stem, file, width, height }
  })
  worker.postMessage({ type: 'add', added })
  for (const { id, name } of added) if (waiting.has(stemOf(name))) giveSism(id, waiting.get(stemOf(name)))
  refresh()
}

async function addSisms(files) {
  $('messages').replaceChildren()
  for (const sism of await readable(files)) {
    const stem = stemOf(sism.file.name)
    waiting.set(stem, sism)
    const matching = [...cards].filter(([, { name }]) => stemOf(name) === stem)
    if (!matching.length) say(`${sism.file.name}: no photograph ${stem} is there yet; it is kept until one comes`)
    for (const [id] of matching) giveSism(id, sism)
  }
  refresh()
}

function giveSism(id, sism) {
  cards.get(id).hasSism = true
  worker.postMessage({ type: 'sism', id, ...sism })
}

async function addSamples(group) {
  const get = async (path, name) => {
    const answer = await fetch(path)
    if (!answer.ok) throw new Error(`${path} can't be loaded (${answer.status})`)
    return new File([await answer.blob()], name)
  }
  try {
    remove([...cards.keys()])
    const images = await Promise.all(group.images.map(({ file, name }) => get(file, name)))
    const sisms = await Promise.all(group.images.filter(({ sism }) => sism).map(({ sism, name }) => get(sism, `${stemOf(name)}.png`)))
    for (const sism of await readable(sisms)) waiting.set(stemOf(sism.file.name), sism)
    await addImages(images)
  } catch (error) {
    say(error.message)
  }
}

function remove(ids) {
  for (const id of ids) {
    cards.get(id)?.element.remove()
    cards.delete(id)
  }
  if (!cards.size) waiting.clear()
  worker.postMessage({ type: 'remove', ids })
  refresh()
}

function makeCard(id, name) {
  const element = $('card').content.firstElementChild.cloneNode(true)
  element.querySelector('h2').textContent = name
  for (const canvas of element.querySelectorAll('canvas')) canvas.setAttribute('aria-label', `${canvas.className} of ${name}`)
  for (const button of element.querySelectorAll('button')) {
    const { kind } = button.dataset
    button.setAttribute('aria-label', kind ? `Download ${button.textContent} of ${name}` : `Remove ${name}`)
    button.onclick = () => (kind ? worker.postMessage({ type: 'save', id, kind, level: level() }) : remove([id]))
  }
  $('cards').append(element)
  return element
}

const level = () => Number($('threshold').value)

/** Draws pixels: `colour(i)` gives red, green, blue and alpha of pixel i. */
function draw(card, kind, colour) {
  const canvas = card.element.querySelector(`canvas.${kind}`)
  canvas.style.aspectRatio = `${card.width} / ${card.height}`
  const picture = new ImageData(SIZE, SIZE)
  for (let i = 0; i < SIZE * SIZE; i++) picture.data.set(colour(i), 4 * i)
  canvas.getContext('2d').putImageData(picture, 0, 0)
}

const grey = (pixels) => (i) => [pixels[i], pixels[i], pixels[i], 255]

function drawCutout(card) {
  if (!card.map) return
  const at = level()
  let count = 0
  draw(card, 'cutout', (i) => {
    const inside = card.map[i] >= at
    count += inside
    return [card.image[3 * i], card.image[3 * i + 1], card.image[3 * i + 2], inside ? 255 : 0]
  })
  note(card, count ? `mask: ${((100 * count) / card.map.length).toFixed(1)} % of the image` : 'the mask is empty at this threshold')
}

function note(card, text) {
  card.element.querySelector('.note').textContent = [card.note, text].filter(Boolean).join('. ')
}

function refresh() {
  for (const card of cards.values()) {
    if (!card.hasSism && !detector) note(card, `needs a SISM: choose or drop ${stemOf(card.name)}.png`)
  }
  $('tools').hidden = ![...cards.values()].some((card) => card.map)
}

const on = {
  started({ engine, detector: has }) {
    detector = has
    $('engine').textContent = `Runs on ${engine}.`
    $('sisms-hint').textContent += has ? '. Optional here: a detector makes those that you do not give.' : '.'
    refresh()
  },
  progress({ what, done, total, images }) {
    if (done === 0) began = performance.now()
    Object.assign($('progress'), total ? { max: total, value: done } : {})
    if (!total) $('progress').removeAttribute('value')
    const left = done > 1 && total > 1 ? ((performance.now() - began) / done) * (total - done) : 0
    const ready = images ? `${plural(images, 'map')} ready${images === 1 ? '; add photographs of the same thing: alone, an image has nothing to share' : ''}` : 'Choose photographs that show the same thing'
    $('status').textContent = what ? what + (left > 2000 ? `; about ${Math.ceil(left / 1000)} s left` : '') : ready
    document.body.dataset.state = what ? 'busy' : 'idle'
  },
  read({ id, image, sism, width, height, note: text }) {
    const card = cards.get(id)
    if (!card) return
    Object.assign(card, { image, width, height, note: text, hasSism: Boolean(sism) || card.hasSism })
    draw(card, 'image', (i) => [image[3 * i], image[3 * i + 1], image[3 * i + 2], 255])
    if (sism) draw(card, 'sism', grey(sism))
    note(card, '')
    refresh()
  },
  map({ id, map }) {
    const card = cards.get(id)
    if (!card) return
    card.map = map
    draw(card, 'map', grey(map))
    drawCutout(card)
    for (const button of card.element.querySelectorAll('button')) button.disabled = false
    refresh()
  },
  time({ milliseconds, images }) {
    $('engine').dataset.milliseconds = milliseconds / images
    $('engine').textContent = $('engine').textContent.replace(/\.( \d.*)?$/, `. ${(milliseconds / 1000 / images).toFixed(2)} s an image.`)
  },
  failed({ id, message }) {
    say(`${cards.get(id)?.name ?? 'image'}: ${message}`)
    remove([id])
  },
  message({ message }) {
    say(message)
  },
  broken({ message }) {
    say(message)
    $('status').textContent = 'Stopped'
    document.body.dataset.state = 'broken'
  },
  file({ name, blob }) {
    const link = Object.assign(document.createElement('a'), { href: URL.createObjectURL(blob), download: name })
    link.click()
    setTimeout(() => URL.revokeObjectURL(link.href), 60000)
  },
}

function accept(zone, input, take) {
  $(input).onchange = () => take([...$(input).files]).then(() => ($(input).value = ''))
  const over = (event, is) => {
    event.preventDefault()
    $(zone).classList.toggle('over', is)
  }
  $(zone).ondragover = (event) => over(event, true)
  $(zone).ondragleave = (event) => over(event, false)
  $(zone).ondrop = (event) => {
    over(event, false)
    take([...event.dataTransfer.files])
  }
}

async function start() {
  if (!globalThis.WebAssembly?.validate(SIMD)) throw new Error('this browser has no WebAssembly SIMD, which the models need: use a current Chrome, Edge, Firefox or Safari')
  if (!globalThis.OffscreenCanvas || !globalThis.CompressionStream) throw new Error('this browser is too old: use a current Chrome, Edge, Firefox or Safari')
  const answer = await fetch('site.json')
  if (!answer.ok) throw new Error(`site.json can't be loaded (${answer.status}): build the site again with icnet web`)
  const site = await answer.json()
  worker = new Worker('worker.js', { type: 'module' })
  worker.onmessage = ({ data }) => on[data.type](data)
  worker.onerror = (event) => on.broken({ message: event.message || 'worker.js can’t be started' })
  const options = new URLSearchParams(location.search)
  worker.postMessage({ type: 'start', site, options: { only: options.get('engine'), threads: Number(options.get('threads')) } })
  accept('drop-images', 'images', addImages)
  accept('drop-sisms', 'sisms', addSisms)
  for (const group of site.samples) {
    const button = Object.assign(document.createElement('button'), { type: 'button', textContent: `Sample: ${group.name}` })
    button.onclick = () => addSamples(group)
    $('samples').append(button, ' ')
  }
  $('threshold').oninput = () => {
    $('level').textContent = level()
    requestAnimationFrame(() => cards.forEach(drawCutout))
  }
  $('zip').onclick = () => {
    const kinds = [...document.querySelectorAll('[name=kind]:checked')].map((box) => box.value)
    if (kinds.length) worker.postMessage({ type: 'zip', kinds, level: level() })
  }
  $('clear').onclick = () => remove([...cards.keys()])
}

start().catch((error) => on.broken({ message: error.message }))
