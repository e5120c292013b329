// Writes a picture again with at most 128 colours: node shrink.mjs FILE
import { readFileSync, writeFileSync } from 'node:fs';
import UPNG from 'upng-js';

const [file] = process.argv.slice(2);
const picture = UPNG.decode(readFileSync(file));
writeFileSync(file, Buffer.from(UPNG.encode(UPNG.toRGBA8(picture), picture.width, picture.height, 128)));
