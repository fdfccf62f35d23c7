"""fastsae inside other SAE trainers: SAELens, dictionary_learning, sparsify; and their checkpoints in each other's form.

Each of the packages is imported by the module that is named after it, and by nothing else.
"""
