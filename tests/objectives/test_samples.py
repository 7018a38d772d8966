from __future__ import annotations

import torch

from palate.diffusion.denoising import Fit
from palate.objectives import samples


def test_sft_is_the_error():
    # (1 + 9) / 2 = 5, (4 + 0) / 2 = 2.
    assert samples.sft(Fit(torch.tensor([[1.0, 3.0], [2.0, 0.0]]))).tolist() == [5, 2]
