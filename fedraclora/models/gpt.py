"""A small GPT with random weights, from transformers' configuration; nothing is downloaded."""

from __future__ import annotations

from fedraclora.limits import Count, Fraction, limited
from fedraclora.models.built import Attention, Built, require_heads, require_input, seeded


@limited("model")
def build_gpt(
    *,
    shape: tuple[int, ...],
    classes: int,
    seed: int,
    hidden: Count = 64,
    layers: Count = 2,
    heads: Count = 4,
    max_length: Count = 128,
    dropout: Fraction = 0.0,
    attention: Attention = "sdpa",
) -> Built:
    """Build a GPT-2 that predicts the next token.

    Its output layer has weights of its own: tied to the table of tokens, as in the original, it
    could not be trained apart from it.

    Args:
        shape: Must be empty: the data are token ids.
        classes: Number of different tokens.
        seed: The seed of the run.
        hidden: Width, a multiple of ``heads``.
        layers: Number of layers.
        heads: Attention heads.
        max_length: Longest input.
        dropout: Dropout of embeddings and of what each block adds.
        attention: ``sdpa`` (one fused kernel) or ``eager`` (plain products).

    Returns:
        The model; head ``lm_head``, targets all linear layers.

    Raises:
        ConfigError: If a key is wrong, naming it.

    References:
        Radford et al., *Language Models are Unsupervised Multitask Learners*, 2019.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    require_input("gpt", shape, classes, text=True)
    require_heads(hidden, heads)
    config = GPT2Config(
        vocab_size=classes,
        n_positions=max_length,
        n_embd=hidden,
        n_layer=layers,
        n_head=heads,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=0.0,  # applied as a function, where no mask can be keyed by client and step
        bos_token_id=None,
        eos_token_id=None,
        activation_function="gelu_pytorch_tanh",  # GPT-2's own, as one kernel in place of eight
        tie_word_embeddings=False,
        use_cache=False,
        attn_implementation=attention,
    )
    with seeded(seed, "model"):
        return Built(GPT2LMHeadModel(config).train(), ("lm_head",), "all-linear")
