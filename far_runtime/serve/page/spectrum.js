// How much of a picture lies at which frequency.

// In place, the FFT of re + i im, whose length is a power of 2.
function fft(re, im) {
  const n = re.length;
  for (let i = 1, j = 0; i < n; i++) {
    let bit = n >> 1;
    for (; j & bit; bit >>= 1) j ^= bit;
    j ^= bit;
    if (i < j) {
      [re[i], re[j]] = [re[j], re[i]];
      [im[i], im[j]] = [im[j], im[i]];
    }
  }
  for (let length = 2; length <= n; length <<= 1) {
    const angle = -2 * Math.PI / length;
    for (let start = 0; start < n; start += length) {
      for (let k = 0; k < length / 2; k++) {
        const c = Math.cos(angle * k), s = Math.sin(angle * k), a = start + k, b = a + length / 2;
        const x = re[b] * c - im[b] * s, y = re[b] * s + im[b] * c;
        re[b] = re[a] - x; im[b] = im[a] - y;
        re[a] += x; im[a] += y;
      }
    }
  }
}

// Mean power of the luminance (its mean taken off) by distance from frequency 0: numbers [n / 2], for the largest
// centred square of n pixels a side, n a power of 2.
export function radialSpectrum(image) {
  const n = 2 ** Math.floor(Math.log2(Math.min(image.width, image.height)));
  const left = (image.width - n) >> 1, top = (image.height - n) >> 1;
  const re = new Float64Array(n * n), im = new Float64Array(n * n);
  let mean = 0;
  for (let y = 0; y < n; y++) {
    for (let x = 0; x < n; x++) {
      const at = 4 * ((y + top) * image.width + x + left), p = image.data;
      mean += re[y * n + x] = (0.2126 * p[at] + 0.7152 * p[at + 1] + 0.0722 * p[at + 2]) / 255;
    }
  }
  mean /= n * n;
  for (let i = 0; i < n * n; i++) re[i] -= mean;
  for (let y = 0; y < n; y++) fft(re.subarray(y * n, y * n + n), im.subarray(y * n, y * n + n));
  const a = new Float64Array(n), b = new Float64Array(n);
  const power = new Float64Array(n / 2), count = new Float64Array(n / 2);
  for (let x = 0; x < n; x++) {
    for (let y = 0; y < n; y++) { a[y] = re[y * n + x]; b[y] = im[y * n + x]; }
    fft(a, b);
    for (let y = 0; y < n; y++) {
      const radius = Math.round(Math.hypot(Math.min(x, n - x), Math.min(y, n - y)));
      if (radius < n / 2) {
        power[radius] += (a[y] ** 2 + b[y] ** 2) / n ** 2;
        count[radius]++;
      }
    }
  }
  return power.map((sum, i) => sum / count[i]);
}

// Draws it into a canvas: frequency to the right, power upwards over six decades.
export function drawSpectrum(canvas, image, colour) {
  const values = radialSpectrum(image), width = canvas.width, height = canvas.height;
  const context = canvas.getContext("2d");
  context.clearRect(0, 0, width, height);
  context.fillStyle = colour;
  const step = width / (values.length - 1);
  for (let i = 1; i < values.length; i++) {
    const part = Math.min(1, Math.max(0, (Math.log10(values[i] + 1e-12) + 4) / 6));
    context.fillRect((i - 1) * step, height * (1 - part), Math.max(1, step - 0.5), height * part);
  }
}
