"""Activations of the embedded language model into a store on disk, the model being loaded and the text tokenised."""

from benchmarks.timing import summary
from fastsae import activations, lm


def test_harvest(benchmark, suite, rows, tmp_path):
    model = lm.load()
    documents = activations.read_documents()
    windows = activations.tokenize(documents, model.tokenizer, 256, suite.harvested)
    source = activations.ModelActivations(model, "blocks.2.hook_resid_post", windows)
    benchmark.pedantic(activations.harvest, args=(source, tmp_path / "store"), rounds=1)
    found = summary(benchmark.stats.stats.data)
    rows.append({"benchmark": "harvest", "tokens": source.n_rows, "d_in": source.d_in, **found})
