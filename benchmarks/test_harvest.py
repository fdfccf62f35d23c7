"""Activations of the embedded language model into a store on disk, the model being loaded and the text tokenised."""

import statistics

from fastsae import activations, lm

TOKENS = {"smoke": 5_000, "bench": 500_000}


def test_harvest(benchmark, shape, rows, tmp_path):
    model = lm.load()
    documents = activations.read_documents()
    windows = activations.tokenize(documents, model.tokenizer, 256, TOKENS[shape.name])
    source = activations.ModelActivations(model, "blocks.2.hook_resid_post", windows)
    benchmark.pedantic(activations.harvest, args=(source, tmp_path / "store"), rounds=1)
    seconds = statistics.median(benchmark.stats.stats.data)
    rows.append({"benchmark": "harvest", "tokens": source.n_rows, "d_in": source.d_in, "seconds": seconds})
