"""A small GPT with random weights, from transformers' configuration; nothing is downloaded."""

from __future__ import annotations

from fedraclora.models.built import (
    Built,
    require_attention,
    require_dropout,
    require_sizes,
    require_text,
    seeded,
)


def build_gpt(
    *,
    shape: tuple[int, ...],
    classes: int,
    seed: int,
    hidden: int = 64,
    layers: int = 2,
    heads: int = 4,
    max_length: int = 128,
    dropout: float = 0.0,
    attention: str = "sdpa",
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

    require_text("gpt", shape, classes)
    require_sizes({"hidden": hidden, "layers": layers, "heads": heads, "max_length": max_length})
    require_dropout(dropout)
    require_attention(attention)
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
