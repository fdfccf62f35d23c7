"""fastsae inside other SAE trainers (SAELens, dictionary_learning, sparsify), and SAEs in each other's files.

Each of the packages is imported by the module that is named after it, and by nothing else.
"""
