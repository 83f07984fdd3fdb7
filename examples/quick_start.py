# %% [markdown]
# # Quick start
#
# Load a model, ask it about a sound, and get a transcript with times. It needs no download: the
# small model and two clips come with the package. Run it as a script, `python
# examples/quick_start.py`, or cell by cell in an editor that knows `# %%`.
#
# The small model only knows synthetic sound. For recordings, put the folder of an official
# checkpoint into `CHECKPOINT`.

# %%
from pathlib import Path

import moss_audio_jax as mj

CHECKPOINT = None  # None: the small model of this package
CLIP = Path(mj.__file__).parent / "assets" / "demo" / "cow_drill_laser.flac"
SPEECH = Path(mj.__file__).parent / "assets" / "demo" / "two_people.flac"
MAX_NEW_TOKENS = 200

# %% [markdown]
# ## Load
# On a CPU the weights are float32, on an accelerator bfloat16.

# %%
model = mj.MossAudio.load(CHECKPOINT)
print(model)

# %% [markdown]
# ## Ask
# `audio` takes files of any usual format, 16 kHz waveforms, or `(samples, rate)`. For many
# questions use `model.generate_batch`; an answer does not depend on the others in its batch.

# %%
timeline = model.generate(
    "List all that is heard, one per line, as start - end: description",
    audio=[CLIP],
    max_new_tokens=MAX_NEW_TOKENS,
)
print(timeline.text)

# %% [markdown]
# The text is parsed into segments, in seconds.

# %%
events = mj.parse_timestamps(timeline.text)
for event in events:
    print(f"{event.start:5.2f} to {event.end:5.2f} s  {event.text}")

# %% [markdown]
# ## Transcribe
# `transcribe` takes sound of any length. `problems` lists parts that are missing or doubtful.

# %%
transcript = mj.transcribe(
    model, SPEECH, timestamps="word", sampling=mj.Sampling(max_new_tokens=MAX_NEW_TOKENS)
)
print(transcript.text)
print(mj.to_srt(transcript.segments[:5]))
print(transcript.problems)
