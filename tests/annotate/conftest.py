import os

import plugins

# Configs name `plugins`, and worker processes import it.
_FOLDER = os.path.dirname(plugins.__file__)
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [_FOLDER, os.environ.get("PYTHONPATH")]))
