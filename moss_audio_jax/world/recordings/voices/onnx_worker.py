"""Runs a neural voice; run by `world/forked.py`, for the noise in a model has a state.

Arguments: the path of an ONNX model, and the name of a tensor in it that becomes its last output.
A request and an answer are `numpy.savez` of the model's inputs, and of its outputs by number.
"""

import io
import pathlib
from collections.abc import Callable

import numpy as np
import onnxruntime


def prepare(path: str, tensor: str) -> Callable[[bytes], bytes]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1  # a fork has no other threads
    options.log_severity_level = 3
    onnxruntime.set_seed(1)
    # Protocol buffers that follow one another are one: the graph gets an output more.
    model = pathlib.Path(path).read_bytes() + _field(7, _field(12, _field(1, tensor.encode())))
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])

    def answer(request: bytes) -> bytes:
        given = dict(np.load(io.BytesIO(request)))
        made, out = session.run(None, given), io.BytesIO()
        np.savez(out, *made)
        return out.getvalue()

    return answer


def _field(number: int, value: bytes) -> bytes:
    """A field of a protocol buffer: its number with the type "bytes", a length, the bytes."""
    assert len(value) < 128, "one byte holds the length"
    return bytes([number << 3 | 2, len(value)]) + value
