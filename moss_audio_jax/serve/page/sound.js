// Samples: decoding, the spectrogram, a WAV file of the microphone.

export const RATE = 16000; // what the model hears

/** Mono samples at 16 kHz of an encoded file. Throws if the browser cannot read it. */
export async function decode(file) {
  // A context of that rate resamples what it decodes.
  const context = new OfflineAudioContext(1, 1, RATE);
  const buffer = await context.decodeAudioData(await file.arrayBuffer());
  const count = buffer.numberOfChannels;
  const samples = buffer.getChannelData(0);
  for (let channel = 1; channel < count; channel++) {
    const more = buffer.getChannelData(channel);
    for (let i = 0; i < samples.length; i++) samples[i] += more[i];
  }
  if (count > 1) for (let i = 0; i < samples.length; i++) samples[i] /= count;
  return samples;
}

// --- spectrogram ---------------------------------------------------------------------------------

const SIZE = 1024; // of the FFT
const FRAME = 640; // samples under the window: 40 ms
const MELS = 96;
const DECADES = 8; // below the maximum: what lies lower is dark, as in the model's log-mel
const LABELS = [250, 500, 1000, 2000, 4000]; // Hz
const LABEL_SPACE = 14; // CSS pixels
// Dark to light, as in timeline.py; colours between them are interpolated.
const COLOURS = [
  [8, 8, 30],
  [48, 18, 90],
  [120, 28, 109],
  [190, 55, 82],
  [237, 105, 37],
  [251, 180, 60],
  [252, 255, 200],
];

const mel = (hertz) => 2595 * Math.log10(1 + hertz / 700);
const hertz = (mel) => 700 * (10 ** (mel / 2595) - 1);
const TOP = mel(RATE / 2);
const hann = Float64Array.from({ length: FRAME }, (_, i) => {
  return 0.5 - 0.5 * Math.cos((2 * Math.PI * i) / FRAME);
});
const cosines = Float64Array.from({ length: SIZE / 2 }, (_, i) => {
  return Math.cos((2 * Math.PI * i) / SIZE);
});
const sines = Float64Array.from({ length: SIZE / 2 }, (_, i) => {
  return -Math.sin((2 * Math.PI * i) / SIZE);
});
const order = Uint16Array.from({ length: SIZE }, (_, i) => {
  let reversed = 0;
  for (let bit = 1; bit < SIZE; bit *= 2) reversed = 2 * reversed + (i & bit ? 1 : 0);
  return reversed;
});
// Triangles: [first bin, weights] of each mel band, and no band without a bin.
const bank = Array.from({ length: MELS }, (_, band) => {
  const edges = [band, band + 1, band + 2].map((edge) => {
    return (hertz((edge * TOP) / (MELS + 1)) * SIZE) / RATE;
  });
  const weights = [];
  const first = Math.min(Math.ceil(edges[0]), Math.round(edges[1]));
  for (let bin = first; bin <= Math.max(edges[2], first); bin++) {
    const rising = (bin - edges[0]) / (edges[1] - edges[0]);
    const falling = (edges[2] - bin) / (edges[2] - edges[1]);
    weights.push(Math.max(Math.min(rising, falling), 0));
  }
  const sum = weights.reduce((a, b) => a + b, 0);
  return [first, sum ? weights.map((weight) => weight / sum) : [1]];
});

const real = new Float64Array(SIZE);
const imaginary = new Float64Array(SIZE);
const power = new Float64Array(SIZE / 2 + 1);

/** The FFT of what is in `real` and `imaginary`, in place. */
function transform() {
  for (let i = 0; i < SIZE; i++) {
    const j = order[i];
    if (j > i) {
      [real[i], real[j]] = [real[j], real[i]];
      [imaginary[i], imaginary[j]] = [imaginary[j], imaginary[i]];
    }
  }
  for (let half = 1; half < SIZE; half *= 2) {
    const step = SIZE / (2 * half);
    for (let start = 0; start < SIZE; start += 2 * half) {
      for (let i = start, k = 0; i < start + half; i++, k += step) {
        const j = i + half;
        const re = real[j] * cosines[k] - imaginary[j] * sines[k];
        const im = real[j] * sines[k] + imaginary[j] * cosines[k];
        real[j] = real[i] - re;
        imaginary[j] = imaginary[i] - im;
        real[i] += re;
        imaginary[i] += im;
      }
    }
  }
}

/** The log10 power of each band around a sample, into `into`. `wide`: samples in the column. */
function column(samples, centre, wide, into) {
  real.fill(0);
  imaginary.fill(0);
  // Two frames go through one FFT, as its real and its imaginary part.
  const left = Math.round(centre - wide / 4 - FRAME / 2);
  const right = Math.round(centre + wide / 4 - FRAME / 2);
  for (let i = 0; i < FRAME; i++) {
    real[i] = hann[i] * (samples[left + i] ?? 0);
    imaginary[i] = hann[i] * (samples[right + i] ?? 0);
  }
  transform();
  for (let k = 0; k <= SIZE / 2; k++) {
    const other = (SIZE - k) % SIZE; // with it, the sum of both frames' powers
    power[k] = real[k] ** 2 + imaginary[k] ** 2 + real[other] ** 2 + imaginary[other] ** 2;
  }
  for (let band = 0; band < MELS; band++) {
    const [first, weights] = bank[band];
    let sum = 1e-10;
    for (let i = 0; i < weights.length; i++) sum += weights[i] * (power[first + i] ?? 0);
    into[band] = Math.log10(sum);
  }
}

/** The spectrogram of one sound. Only what is visible is computed. */
export class Spectrogram {
  constructor(samples) {
    this.samples = samples;
    this.bands = new Float32Array(MELS);
    this.most = -Infinity;
    const looks = Math.min(400, Math.ceil(samples.length / FRAME));
    for (let i = 0; i < looks; i++) {
      column(samples, ((i + 0.5) * samples.length) / looks, FRAME, this.bands);
      this.most = Math.max(this.most, ...this.bands);
    }
  }

  /** Draws seconds `from`..`to` over all of a canvas. */
  draw(canvas, from, to) {
    const scale = devicePixelRatio || 1;
    const [wide, high] = [canvas.clientWidth, canvas.clientHeight];
    if (!wide || !high) return;
    canvas.width = Math.round(wide * scale);
    canvas.height = Math.round(high * scale);
    const picture = new ImageData(wide, MELS);
    const each = ((to - from) * RATE) / wide;
    for (let x = 0; x < wide; x++) {
      column(this.samples, from * RATE + (x + 0.5) * each, each, this.bands);
      for (let band = 0; band < MELS; band++) {
        const level = 1 - (this.most - this.bands[band]) / DECADES;
        const at = Math.min(Math.max(level, 0), 1) * (COLOURS.length - 1);
        const below = Math.min(Math.floor(at), COLOURS.length - 2);
        const pixel = 4 * ((MELS - 1 - band) * wide + x);
        for (let c = 0; c < 3; c++) {
          const [dark, light] = [COLOURS[below][c], COLOURS[below + 1][c]];
          picture.data[pixel + c] = dark + (light - dark) * (at - below);
        }
        picture.data[pixel + 3] = 255;
      }
    }
    const small = new OffscreenCanvas(wide, MELS);
    small.getContext("2d").putImageData(picture, 0, 0);
    const context = canvas.getContext("2d");
    context.imageSmoothingQuality = "high";
    context.drawImage(small, 0, 0, canvas.width, canvas.height);
    this.label(context, scale, high);
  }

  label(context, scale, high) {
    context.scale(scale, scale);
    context.font = "10px system-ui, sans-serif";
    context.textBaseline = "middle";
    let free = high;
    for (const frequency of LABELS) {
      const y = high * (1 - mel(frequency) / TOP);
      if (y > free) continue;
      free = y - LABEL_SPACE;
      const text = frequency < 1000 ? `${frequency} Hz` : `${frequency / 1000} kHz`;
      context.fillStyle = "#0008";
      context.fillRect(0, y - 6, context.measureText(text).width + 8, 12);
      context.fillStyle = "#fff";
      context.fillText(text, 4, y);
    }
  }
}

// --- microphone ----------------------------------------------------------------------------------

/** Records until `stop`, which gives a WAV file at 16 kHz. */
export async function record() {
  if (!navigator.mediaDevices) {
    throw new Error("The browser gives a microphone to pages of localhost or over HTTPS only.");
  }
  // The model shall hear what there is, not what a telephone would make of it.
  const plain = { echoCancellation: false, noiseSuppression: false, autoGainControl: false };
  const stream = await navigator.mediaDevices.getUserMedia({ audio: plain });
  const context = new AudioContext();
  const chunks = [];
  await context.audioWorklet.addModule("recorder.js");
  const node = new AudioWorkletNode(context, "recorder");
  node.port.onmessage = (message) => chunks.push(message.data);
  context.createMediaStreamSource(stream).connect(node);
  node.connect(context.destination); // silent, but without it nothing flows
  return {
    async stop() {
      stream.getTracks().forEach((track) => track.stop());
      await context.close();
      const heard = await resampled(chunks, context.sampleRate);
      return new File([wav(heard)], "recording.wav", { type: "audio/wav" });
    },
  };
}

async function resampled(chunks, rate) {
  const count = chunks.reduce((sum, chunk) => sum + chunk.length, 0);
  if (!count) throw new Error("Nothing was recorded.");
  const context = new OfflineAudioContext(1, Math.ceil((count * RATE) / rate), RATE);
  const source = context.createBufferSource();
  source.buffer = context.createBuffer(1, count, rate);
  let at = 0;
  for (const chunk of chunks) {
    source.buffer.copyToChannel(chunk, 0, at);
    at += chunk.length;
  }
  source.connect(context.destination);
  source.start();
  return (await context.startRendering()).getChannelData(0);
}

/** Samples in -1..1 as a WAV file of 16 bits, mono, 16 kHz. */
function wav(samples) {
  const view = new DataView(new ArrayBuffer(44 + 2 * samples.length));
  const text = (at, value) => [...value].forEach((c, i) => view.setUint8(at + i, c.charCodeAt(0)));
  text(0, "RIFF");
  view.setUint32(4, 36 + 2 * samples.length, true);
  text(8, "WAVEfmt ");
  view.setUint32(16, 16, true);
  view.setUint16(20, 1, true); // PCM
  view.setUint16(22, 1, true); // channels
  view.setUint32(24, RATE, true);
  view.setUint32(28, 2 * RATE, true);
  view.setUint16(32, 2, true);
  view.setUint16(34, 16, true);
  text(36, "data");
  view.setUint32(40, 2 * samples.length, true);
  samples.forEach((sample, i) => {
    view.setInt16(44 + 2 * i, Math.round(32767 * Math.max(-1, Math.min(1, sample))), true);
  });
  return view.buffer;
}
