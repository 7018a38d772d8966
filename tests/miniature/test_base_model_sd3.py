"""The builder of the miniature Stable Diffusion 3."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from palate.miniature import world
from tools.miniature.base_model_sd3 import MergedZeros, first_with_projection, new_transformer


def test_equal_tokens_of_text_can_be_one_whose_attention_counts_as_often() -> None:
    torch.manual_seed(0)
    transformer = new_transformer(24).double()
    x, t = torch.randn(2, 4, 16, 16).double(), torch.tensor([100.0, 900.0]).double()
    text, pooled = torch.randn(2, 5, 24).double(), torch.randn(2, 24).double()

    def answer(zeros: int) -> tuple[torch.Tensor, torch.Tensor]:
        transformer.zero_grad()
        output = transformer(x, F.pad(text, (0, 0, 0, zeros)), pooled, t, return_dict=False)[0]
        output.square().mean().backward()
        gradient = transformer.context_embedder.bias.grad
        assert gradient is not None
        return output.detach(), gradient.clone()

    whole = answer(30)
    transformer.set_attn_processor(MergedZeros(30))
    for one, other in zip(whole, answer(1), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_the_first_text_encoder_reads_as_mini_sds_does() -> None:
    from transformers import CLIPTextModel

    folder = world.checkpoint("mini-sd") / "text_encoder"
    ids = torch.randint(500, (2, 48), generator=torch.Generator().manual_seed(0))
    ids[:, -1] = CLIPTextModel.from_pretrained(folder).config.eos_token_id
    with torch.no_grad():
        theirs = CLIPTextModel.from_pretrained(folder, dtype=torch.float32)(ids, output_hidden_states=True)
        ours = first_with_projection(folder)(ids, output_hidden_states=True)
    # The last layer of the three stands twice, so what is read is the output of the third, before the last norm.
    torch.testing.assert_close(ours.hidden_states[-2], theirs.hidden_states[-1])
    assert ours.text_embeds.shape == (2, 128)
