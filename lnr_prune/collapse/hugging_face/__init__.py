"""Models of Hugging Face's transformers: their settings stay true, and they are saved as folders that others load.

``settings`` finds the entries of ``model.config`` that count what a plan removes, so that a model made from the changed
settings is the smaller one. ``folder`` writes and reads folders with weights, settings and, where these cannot say how
large every layer is, the plan.
"""
