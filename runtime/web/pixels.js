// Pixels as runtime/preprocess.py makes them: Pillow's antialiased bilinear resize, and its grey of colours.
// The arithmetic is that of Pillow's Resample.c, to the last bit: fixed point for 8 bits, doubles for floats.

const PRECISION = 1 << 22 // of a coefficient for 8-bit pixels
export const SIZE = 224 // side of the network's input and output

/** For every output pixel: where its input pixels start, and their weights, which add up to 1. */
function windows(from, to) {
  const scale = from / to
  const support = Math.max(scale, 1)
  return Array.from({ length: to }, (_, i) => {
    const center = (i + 0.5) * scale
    const first = Math.max(0, Math.trunc(center - support + 0.5))
    const last = Math.min(from, Math.trunc(center + support + 0.5))
    const weights = new Float64Array(last - first)
    let sum = 0
    for (let k = 0; k < weights.length; k++) {
      weights[k] = Math.max(0, 1 - Math.abs((k + first - center + 0.5) / support))
      sum += weights[k]
    }
    if (sum !== 0) for (let k = 0; k < weights.length; k++) weights[k] /= sum
    return { first, weights }
  })
}

/** Resizes an image row by row, so that a large one never lies in memory as a whole. */
export class Resizer {
  /** `channels` of `step` numbers per pixel are taken; `exact`: floats, else 8-bit pixels. */
  constructor(width, height, toWidth, toHeight, { channels = 1, step = channels, exact = false } = {}) {
    Object.assign(this, { channels, step, toHeight, exact, row: 0, done: 0, sums: [] })
    const weights = (list) => (exact ? list : list.map(({ first, weights }) => ({ first, weights: weights.map((w) => Math.trunc(0.5 + w * PRECISION)) })))
    this.across = weights(windows(width, toWidth))
    this.down = weights(windows(height, toHeight))
    this.downFirst = height > toHeight && height - toHeight > 2 * (width - toWidth) // as Pillow has it from version 13
    this.start = exact ? 0 : PRECISION / 2
  }

  numbers(length) {
    return this.exact ? new Float32Array(length) : new Uint8Array(length)
  }

  /** One row to its new width. */
  squeeze(row, step) {
    const { across, channels, start, exact } = this
    const result = this.numbers(across.length * channels)
    let out = 0
    for (const { first, weights } of across) {
      for (let c = 0; c < channels; c++) {
        let sum = start
        for (let k = 0, at = first * step + c; k < weights.length; k++, at += step) sum += row[at] * weights[k]
        result[out++] = exact ? sum : sum / PRECISION
      }
    }
    return result
  }

  /** Takes the next row, and yields the rows of the result that are complete with it. */
  *push(row) {
    const { down, downFirst, channels, step, sums, exact } = this
    const narrow = downFirst ? row : this.squeeze(row, step)
    for (let y = this.done; y < this.toHeight && down[y].first <= this.row; y++) {
      const { first, weights } = down[y]
      const sum = (sums[y] ??= new Float64Array(narrow.length).fill(this.start))
      const weight = weights[this.row - first]
      for (let x = 0; x < sum.length; x++) sum[x] += narrow[x] * weight
      if (this.row === first + weights.length - 1) {
        const result = this.numbers(sum.length)
        for (let x = 0; x < sum.length; x++) result[x] = exact ? sum[x] : sum[x] / PRECISION
        delete sums[y]
        this.done = y + 1
        yield downFirst ? this.squeeze(result, step) : result
      }
    }
    this.row++
  }
}

/** Grey of RGBA pixels, as Pillow's convert("L") has it. */
export function luma(rgba) {
  const grey = new Uint8Array(rgba.length / 4)
  for (let i = 0; i < grey.length; i++) {
    grey[i] = (rgba[4 * i] * 19595 + rgba[4 * i + 1] * 38470 + rgba[4 * i + 2] * 7471 + 0x8000) >> 16
  }
  return grey
}

/** Grey levels (0 … 255) of float32 numbers in [0, 1]; clamped arrays round as NumPy's rint, halves to even. */
export const levels = (numbers) => new Uint8Array(new Uint8ClampedArray(numbers.map((v) => v * 255)).buffer)

/** The rows of a map, float32 [fromHeight, fromWidth], at another size: one Uint8Array of grey levels after the other. */
export function* restoredRows(map, width, height, fromWidth = SIZE, fromHeight = SIZE) {
  const resizer = new Resizer(fromWidth, fromHeight, width, height, { exact: true })
  for (let y = 0; y < fromHeight; y++) {
    for (const row of resizer.push(map.subarray(y * fromWidth, (y + 1) * fromWidth))) yield levels(row)
  }
}

/** An image's rows, an (async) iterable, at another size: uint8 [toHeight, toWidth, channels]. */
export async function resized(rows, width, height, options = {}, toWidth = SIZE, toHeight = SIZE) {
  const resizer = new Resizer(width, height, toWidth, toHeight, options)
  const result = new Uint8Array(toWidth * toHeight * resizer.channels)
  let at = 0
  for await (const row of rows) {
    for (const done of resizer.push(row)) {
      result.set(done, at)
      at += done.length
    }
  }
  return result
}
