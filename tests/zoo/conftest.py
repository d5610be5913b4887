"""Let the tests of this folder import its modules by name, and the browser of the package's own tests."""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
sys.path.append(str(HERE.parent / "mhc_compile"))
