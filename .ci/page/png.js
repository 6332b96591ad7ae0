// Makes the pictures of a browser small: a page has few colours, so 256 of them will do.

import { deflateSync, inflateSync } from "node:zlib";

const SIGNATURE = Buffer.from("\x89PNG\r\n\x1a\n", "latin1");
const COLOURS = 256;

// The chunks of a PNG, as [type, data].
function* chunksOf(png) {
  for (let at = SIGNATURE.length; at < png.length;) {
    const length = png.readUInt32BE(at);
    yield [png.toString("latin1", at + 4, at + 8), png.subarray(at + 8, at + 8 + length)];
    at += length + 12;
  }
}

// The check sum of a chunk (PNG specification, annex D).
function crc32(bytes) {
  let sum = ~0;
  for (const byte of bytes) {
    sum ^= byte;
    for (let bit = 0; bit < 8; bit += 1) sum = sum & 1 ? sum >>> 1 ^ 0xEDB88320 : sum >>> 1;
  }
  return ~sum >>> 0;
}

function chunk(type, data) {
  const head = Buffer.from("    " + type, "latin1"), tail = Buffer.alloc(4);
  head.writeUInt32BE(data.length);
  tail.writeUInt32BE(crc32(Buffer.concat([head.subarray(4), data])));
  return Buffer.concat([head, data, tail]);
}

// The bytes of the pixels, once each line's filter is taken off (PNG specification, section 9).
function unfilter(raw, height, width, bytes) {
  const stride = width * bytes, pixels = Buffer.alloc(height * stride);
  for (let y = 0; y < height; y += 1) {
    const filter = raw[y * (stride + 1)], line = y * stride;
    for (let x = 0; x < stride; x += 1) {
      const left = x >= bytes ? pixels[line + x - bytes] : 0, up = y ? pixels[line + x - stride] : 0;
      const corner = x >= bytes && y ? pixels[line + x - stride - bytes] : 0, guess = left + up - corner;
      const [toLeft, toUp, toCorner] = [left, up, corner].map((value) => Math.abs(guess - value));
      const paeth = toLeft <= toUp && toLeft <= toCorner ? left : toUp <= toCorner ? up : corner;
      pixels[line + x] = raw[y * (stride + 1) + 1 + x] + [0, left, up, (left + up) >> 1, paeth][filter];
    }
  }
  return pixels;
}

// How far two colours are apart.
function distance(one, other) {
  return [16, 8, 0].reduce((sum, shift) => sum + ((one >> shift & 255) - (other >> shift & 255)) ** 2, 0);
}

// The same picture with a palette.  A colour after the other is taken into it: that which would lose most as the nearest
// of those before, by distance and frequency.  (By frequency alone, a small green dot would become gray.)
export function withPalette(png) {
  const chunks = [...chunksOf(png)], header = chunks[0][1];
  const [width, height, bytes] = [header.readUInt32BE(0), header.readUInt32BE(4), { 2: 3, 6: 4 }[header[9]]];
  const pixels = unfilter(inflateSync(Buffer.concat(chunks.filter(([type]) => type === "IDAT").map(([, data]) => data))), height, width, bytes);
  const counts = new Map(), colourAt = (at) => pixels.readUIntBE(at, 3);
  for (let at = 0; at < pixels.length; at += bytes) counts.set(colourAt(at), (counts.get(colourAt(at)) ?? 0) + 1);
  const colours = Array.from(counts, ([colour, count]) => ({ colour, count, index: 0, loss: Infinity })), palette = [];
  while (palette.length < Math.min(COLOURS, colours.length)) {
    const { colour } = colours.reduce((worst, each) => each.loss * each.count > worst.loss * worst.count ? each : worst);
    for (const each of colours) {
      const loss = distance(each.colour, colour);
      if (loss < each.loss) Object.assign(each, { loss, index: palette.length });
    }
    palette.push(colour);
  }
  const indexes = new Map(colours.map(({ colour, index }) => [colour, index]));
  const lines = Buffer.alloc(height * (width + 1));
  for (let y = 0; y < height; y += 1) {
    for (let x = 0; x < width; x += 1) lines[y * (width + 1) + 1 + x] = indexes.get(colourAt((y * width + x) * bytes));
  }
  const size = Buffer.from(header);
  size[9] = 3;              // colours by palette
  return Buffer.concat([SIGNATURE, chunk("IHDR", size), chunk("PLTE", Buffer.from(palette.flatMap((colour) => [colour >> 16, colour >> 8 & 255, colour & 255]))),
                        chunk("IDAT", deflateSync(lines, { level: 9 })), chunk("IEND", Buffer.alloc(0))]);
}
