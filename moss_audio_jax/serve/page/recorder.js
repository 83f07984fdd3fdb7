// Hands the microphone's samples to the page, as the mean of all channels.
class Recorder extends AudioWorkletProcessor {
  process([channels]) {
    if (channels.length) {
      const samples = new Float32Array(channels[0].length);
      for (const channel of channels) {
        for (let i = 0; i < samples.length; i++) samples[i] += channel[i] / channels.length;
      }
      this.port.postMessage(samples, [samples.buffer]);
    }
    return true;
  }
}

registerProcessor("recorder", Recorder);
