// Makes one script of page.jsx and all that it needs: node bundle.mjs OUTPUT (and the styles beside it)
import { build } from 'esbuild';

await build({
  entryPoints: ['page.jsx'],
  outfile: process.argv[2],
  bundle: true,
  format: 'esm',
  jsx: 'automatic',
  minify: true,
  define: { 'process.env.NODE_ENV': '"production"', global: 'window' },
  loader: { '.ttf': 'empty' }, // the code editor's icons, which no panel shows
  logLevel: 'warning',
});
