# %% [markdown]
# # One model on eight devices
#
# JAX can present a CPU as eight devices, so everything below runs on a laptop as on eight TPU chips
# or GPUs. It shows how each parameter is split for training, and that a model's answers do not
# depend on the mesh.

# %%
import os

# Before JAX starts. On a machine with real accelerators leave these two lines out.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

from pathlib import Path

import jax

import moss_audio_jax as mj
from moss_audio_jax.sharding import make_mesh, param_shardings

CLIP = Path(mj.__file__).parent / "assets" / "demo" / "cow_drill_laser.flac"
QUESTION = "List all that is heard, one per line, as start - end: description"
MAX_NEW_TOKENS = 200

# %% [markdown]
# ## A mesh
# Four axes. `data` splits the rows of a batch; `fsdp` splits rows and parameters, and weights are
# gathered layer by layer; `tensor` splits heads and hidden units; `sequence` splits the tokens of a
# long row. Here: 1 x 4 x 2 x 1 = 8 devices.

# %%
mesh = make_mesh(data=1, fsdp=4, tensor=2)
print(mesh)

# %% [markdown]
# ## Where each parameter lives
# A table of path patterns (`moss_audio_jax/sharding.py`) says so. The axis of a stack of layers is
# never split, and an axis that does not divide its dimension is left out. The columns: the whole
# shape, the mesh axes that split it ("-": not split), and the shape on one device.

# %%
one = mj.MossAudio.load()
params = one.stacked_params()  # layers stacked on axis 0, as training has them
shardings = param_shardings(params, one.config, mesh)
placed = jax.device_put(params, shardings)


def path_of(keys):
    return "/".join(str(key.key) for key in keys)


total = held = 0
for keys, leaf in jax.tree_util.tree_leaves_with_path(placed):
    shard = leaf.addressable_shards[0].data
    total, held = total + leaf.nbytes, held + shard.nbytes
    spec = ", ".join(axis or "-" for axis in leaf.sharding.spec) or "a copy everywhere"
    print(f"{path_of(keys):55} {leaf.shape!s:20} {spec:22} {shard.shape}")
print(f"all parameters: {total / 1e6:.1f} MB; on one device: {held / 1e6:.1f} MB")

# %% [markdown]
# One of them as a picture: which device holds which part of a matrix.

# %%
gate = placed["language_model"]["layers"]["mlp"]["gate_proj"]["kernel"][0]
jax.debug.visualize_array_sharding(gate)

# %% [markdown]
# ## The same answer
# For generation, `tensor` also takes the devices of `fsdp`, because a weight that is split along
# the axis over which a product sums would have to be gathered for every token.

# %%
eight = mj.MossAudio.load(mesh={"fsdp": 4, "tensor": 2})
print(eight)
alone = one.generate(QUESTION, audio=[CLIP], max_new_tokens=MAX_NEW_TOKENS)
together = eight.generate(QUESTION, audio=[CLIP], max_new_tokens=MAX_NEW_TOKENS)
print(together.text)
assert together.ids == alone.ids
