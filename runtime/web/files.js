// PNG and ZIP files, written in pieces: no picture has to lie in memory as a whole.

const CRC = Uint32Array.from({ length: 256 }, (_, n) => {
  for (let k = 0; k < 8; k++) n = n & 1 ? 0xedb88320 ^ (n >>> 1) : n >>> 1
  return n
})

export function crc32(bytes) {
  let crc = 0xffffffff
  for (let i = 0; i < bytes.length; i++) crc = CRC[(crc ^ bytes[i]) & 255] ^ (crc >>> 8)
  return (crc ^ 0xffffffff) >>> 0
}

function chunk(kind, content) {
  const bytes = new Uint8Array(12 + content.length)
  const view = new DataView(bytes.buffer)
  view.setUint32(0, content.length)
  for (let i = 0; i < 4; i++) bytes[4 + i] = kind.charCodeAt(i)
  bytes.set(content, 8)
  view.setUint32(8 + content.length, crc32(bytes.subarray(4, 8 + content.length)))
  return bytes
}

/** A PNG file. `rows`: an (async) iterable of the rows, each width × channels bytes; channels: 1 (grey) or 4 (RGBA). */
export async function png(width, height, channels, rows) {
  const deflate = new CompressionStream('deflate')
  const packed = new Response(deflate.readable).arrayBuffer()
  const writer = deflate.writable.getWriter()
  for await (const row of rows) {
    const line = new Uint8Array(1 + row.length)
    line.set(row, 1)
    if (channels === 4) {
      line[0] = 1 // each byte less that of the pixel before: photographs pack better so
      for (let i = row.length; i > 4; i--) line[i] -= line[i - 4]
    }
    await writer.write(line)
  }
  await writer.close()
  const header = new Uint8Array(13)
  new DataView(header.buffer).setUint32(0, width)
  new DataView(header.buffer).setUint32(4, height)
  header.set([8, channels === 1 ? 0 : 6], 8)
  const parts = [chunk('IHDR', header), chunk('IDAT', new Uint8Array(await packed)), chunk('IEND', new Uint8Array())]
  return new Blob([new Uint8Array([137, 80, 78, 71, 13, 10, 26, 10]), ...parts], { type: 'image/png' })
}

/** A ZIP file of stored entries; pictures are compressed already. */
export class Zip {
  parts = []
  directory = []
  offset = 0

  /** Throws RangeError where the format's 4 GB or 65 535 entries are passed. */
  async add(name, blob) {
    const bytes = new TextEncoder().encode(name)
    if (this.offset + blob.size > 0xf0000000 || this.directory.length === 2 * 0xffff) throw new RangeError('more than a ZIP file holds: download fewer at a time')
    // Version 2.0, names in UTF-8, stored, 1 January 1980: no clock is read.
    const common = [20, 0, 0, 8, 0, 0, 0, 0, 33, 0]
    const rest = new DataView(new ArrayBuffer(16))
    const crc = crc32(new Uint8Array(await blob.arrayBuffer()))
    ;[crc, blob.size, blob.size].forEach((number, i) => rest.setUint32(4 * i, number, true))
    rest.setUint16(12, bytes.length, true)
    const place = new DataView(new ArrayBuffer(14))
    place.setUint32(10, this.offset, true)
    this.directory.push(new Uint8Array([80, 75, 1, 2, 20, 0, ...common, ...new Uint8Array(rest.buffer), ...new Uint8Array(place.buffer)]), bytes)
    const local = new Uint8Array([80, 75, 3, 4, ...common, ...new Uint8Array(rest.buffer)])
    this.parts.push(local, bytes, blob)
    this.offset += local.length + bytes.length + blob.size
  }

  blob() {
    const end = new DataView(new ArrayBuffer(22))
    const size = this.directory.reduce((sum, part) => sum + part.length, 0)
    const n = this.directory.length / 2
    end.setUint32(0, 0x06054b50, true)
    end.setUint16(8, n, true)
    end.setUint16(10, n, true)
    end.setUint32(12, size, true)
    end.setUint32(16, this.offset, true)
    return new Blob([...this.parts, ...this.directory, end], { type: 'application/zip' })
  }
}
