"""Sample texts of a base model, to be read by people."""

import itertools

from nanochat.dataset import get_data_dir, iter_documents, read_source

PROMPTS = [
    "The largest city of France is",
    "Water is made of hydrogen and",
    "If today is Monday, then tomorrow is",
    "The opposite of cold is",
    "The planets of the solar system are",
    "My favourite season is",
    "If 4*x + 1 = 13, then x is",
]


def prompts() -> list[str]:
    """Prompts about general knowledge for web text; for other sources the beginnings of validation documents."""
    if read_source(get_data_dir())["source"] == "hub":
        return PROMPTS
    documents = itertools.chain.from_iterable(iter_documents("val"))
    return [document[:40] for document in itertools.islice(documents, len(PROMPTS))]


def sample_texts(engine, tokenizer, make_session=None) -> list[str]:
    """
    Continuations of the prompts at temperature 0.7, then a few texts without a prompt at temperature 1.

    make_session(seed=…): the session for generating a text; None for the plain context.
    """
    bos = tokenizer.get_bos_token_id()
    texts = []
    for prompt in prompts():
        prompt_ids = tokenizer.encode(prompt, prepend=bos)
        ids, _ = engine.generate_batch(prompt_ids, make_session=make_session, max_tokens=48, temperature=0.7, top_k=50)
        texts.append(tokenizer.decode(ids[0][1:]))
    ids, _ = engine.generate_batch([bos], 2, make_session=make_session, max_tokens=96, temperature=1.0)
    return texts + [tokenizer.decode(row[1:]) for row in ids]
