"""Write train_losses.json again: `python -m tests.golden.make_train_losses`.

Do so only when the same code agrees with the published implementation's own numbers.
"""

from __future__ import annotations

import json
from pathlib import Path

from tests.test_train_losses import every_term

if __name__ == "__main__":
    path = Path(__file__).with_name("train_losses.json")
    path.write_text(json.dumps(every_term(width=8, side_px=32), indent=1) + "\n")
