import os

# `plugins` is named by configs, in worker processes too.
_HERE = os.path.dirname(__file__)
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [_HERE, os.environ.get("PYTHONPATH")]))
