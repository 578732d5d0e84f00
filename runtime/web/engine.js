// The exported models in onnxruntime-web: WebGPU where there is one that computes them correctly, else WASM.

import { SIZE, levels, resized, restoredRows } from './pixels.js'

const IMAGES = `images uint8 [?, ${SIZE}, ${SIZE}, 3]`
const SISMS = `sisms uint8 [?, ${SIZE}, ${SIZE}]`
const MAPS = `maps float32 [?, ${SIZE}, ${SIZE}]`
const CONTRACT = {
  model: [`${IMAGES}, ${SISMS}`, MAPS],
  intra: [`${IMAGES}, ${SISMS}`, 'sivs float32 [?, S]'],
  banked: [`bank float32 [?, S], ${IMAGES}, ${SISMS}`, MAPS],
  detector: ['images uint8 [?, H, W, 3]', 'sisms float32 [?, H, W]'],
}
const MAX_SIDE = 640 // pixels, of an image that a detector of any size sees
const MAX_ERROR = 1 // grey level, on average: a GPU whose maps are further from Python's is not used

/** Tensors as text; axes that may have any size are letters. */
function tensors(metadata, role) {
  const text = ({ name, type, shape }) => {
    const free = role === 'detector' ? ['?', 'H', 'W', 3] : ['bank', 'sivs'].includes(name) ? ['?', 'S'] : ['?']
    return `${name} ${type} [${shape.map((size, axis) => (axis < free.length ? free[axis] : size)).join(', ')}]`
  }
  return [...metadata].map(text).sort().join(', ')
}

export class Engine {
  sessions = {}

  /** `report(text)` is told what is being done; `only` is "wasm" or "webgpu" to try nothing else. */
  async start(site, { only, threads }, report) {
    const tries = only ? [only] : (await hasWebGPU()) ? ['webgpu', 'wasm'] : ['wasm']
    const models = {}
    for (const [role, file] of Object.entries(site.models)) {
      report(`Loading ${file}`)
      models[role] = await download(`models/${file}`)
    }
    for (const [index, provider] of tries.entries()) {
      report(`Starting ${provider === 'webgpu' ? 'WebGPU' : 'WebAssembly'}`)
      try {
        await this.open(site, models, provider, threads)
        if (provider === 'wasm' || (await this.agrees())) break
        throw new Error('its maps differ from those of the CPU')
      } catch (error) {
        if (index === tries.length - 1) throw error
        this.refused = error.message
      }
    }
  }

  async open(site, models, provider, threads) {
    this.ort = await import(provider === 'webgpu' ? './ort/ort.jspi.min.mjs' : './ort/ort.wasm.min.mjs')
    const isolated = self.crossOriginIsolated
    this.threads = isolated ? Math.min(threads || navigator.hardwareConcurrency || 1, 8) : 1
    this.ort.env.wasm.wasmPaths = new URL('./ort/', import.meta.url).href
    this.ort.env.wasm.numThreads = this.threads
    this.ort.env.logLevel = 'fatal'
    for (const [role, bytes] of Object.entries(models)) {
      const options = { executionProviders: [provider], logSeverityLevel: 4 }
      const session = await this.ort.InferenceSession.create(bytes, options).catch((error) => {
        throw new Error(`${site.models[role]} can't be loaded: ${error.message}`)
      })
      const found = [tensors(session.inputMetadata, role), tensors(session.outputMetadata, role)]
      if (found.join() !== CONTRACT[role].join()) {
        const what = role === 'detector' ? 'no detector for this page' : 'no ICNet export'
        throw new Error(`${site.models[role]} is ${what}: expected inputs ${CONTRACT[role].join(' and output ')}, found ${found.join(' and ')}`)
      }
      this.sessions[role] = session
    }
    const workers = isolated ? '' : ' (the server does not send the headers for more)'
    this.text = provider === 'webgpu' ? 'WebGPU' : `WebAssembly, ${this.threads} thread${this.threads > 1 ? 's' : workers}`
    if (this.refused && provider === 'wasm') this.text += `; WebGPU was not used: ${this.refused}`
  }

  /** Whether the maps of two images of noise are those that Python computed when the site was made. */
  async agrees() {
    const noise = (length) => Uint8Array.from({ length }, (_, i) => (Math.imul(i, 2654435761) >>> 13) & 255)
    const [images, sisms] = [noise(2 * 3 * SIZE * SIZE), noise(2 * SIZE * SIZE)]
    const group = [0, 1].map((i) => ({ image: part(images, i, 2), sism: part(sisms, i, 2) }))
    const expected = await download('models/check.bin')
    let error = 0
    for await (const { item, map } of this.maps(group)) {
      const own = part(expected, group.indexOf(item), 2)
      levels(map).forEach((level, k) => (error += Math.abs(level - own[k]) / expected.length))
    }
    return error <= MAX_ERROR
  }

  /** One call of a model with the images and SISMs of some items, and a bank. */
  async call(role, items, bank) {
    const { Tensor } = this.ort
    const joined = async (key) => new Uint8Array(await concatenated(items.map((item) => item[key])))
    const feeds = {
      images: new Tensor('uint8', await joined('image'), [items.length, SIZE, SIZE, 3]),
      sisms: new Tensor('uint8', await joined('sism'), [items.length, SIZE, SIZE]),
    }
    if (bank) feeds.bank = new Tensor('float32', bank.data, bank.dims)
    const [output] = Object.values(await this.sessions[role].run(feeds))
    if (!output.data.every(Number.isFinite)) throw new Error('the model computed NaN or infinite values: its file may be damaged')
    return output
  }

  /** The maps of a group, one after the other where there is a bank export; each `step` is told before it is done. */
  async *maps(group, step = async () => {}) {
    if (!this.sessions.banked) {
      await step('Map', group[0], group.length)
      const { data } = await this.call('model', group)
      for (const [i, item] of group.entries()) yield { item, map: part(data, i, group.length).slice() }
      return
    }
    for (const item of group) {
      if (item.sivs) continue
      await step('SIVs', item)
      item.sivs = (await this.call('intra', [item])).data.slice()
    }
    const bank = { data: new Float32Array(await concatenated(group.map((item) => item.sivs))), dims: [group.length, group[0].sivs.length] }
    for (const item of group) {
      await step('Map', item)
      yield { item, map: (await this.call('banked', [item], bank)).data.slice() }
    }
  }

  get oneByOne() {
    return 'banked' in this.sessions
  }

  /** The SISM of an image from the detector, uint8 [224, 224]: `rows` are its RGBA rows. */
  async detected(rows, width, height) {
    const shape = this.sessions.detector.inputMetadata[0].shape
    const scale = Math.min(1, MAX_SIDE / Math.max(width, height))
    const [h, w] = [height, width].map((n, i) => (typeof shape[i + 1] === 'number' ? shape[i + 1] : Math.max(rint(n * scale), 1)))
    const seen = await resized(rows, width, height, { channels: 3, step: 4 }, w, h)
    const found = (await this.sessions.detector.run({ images: new this.ort.Tensor('uint8', seen, [1, h, w, 3]) })).sisms
    if (!found.data.every((v) => v > -1e-3 && v < 1.001)) throw new Error('the detector gave values outside 0 … 1 for it')
    const [, foundHeight, foundWidth] = found.dims
    return resized(restoredRows(found.data, width, height, foundWidth, foundHeight), width, height)
  }
}

const part = (array, i, n) => array.subarray((i * array.length) / n, ((i + 1) * array.length) / n)
const concatenated = (arrays) => new Blob(arrays).arrayBuffer()

/** The nearest integer; halves to the even one, as in Python. */
const rint = (v) => (v % 1 === 0.5 ? 2 * Math.round(v / 2) : Math.round(v))

async function hasWebGPU() {
  if (!('Suspending' in WebAssembly)) return false // onnxruntime-web's WebGPU build for it is the smaller one
  return Boolean(await navigator.gpu?.requestAdapter().catch(() => null))
}

async function download(path) {
  const answer = await fetch(new URL(path, import.meta.url)).catch(() => ({ ok: false, status: 'no connection' }))
  if (!answer.ok) throw new Error(`${path} can't be loaded (${answer.status})`)
  return new Uint8Array(await answer.arrayBuffer())
}
