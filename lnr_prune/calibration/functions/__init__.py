"""What torch functions do with weights.

In: a call of a torch function, and the weights. Out: the application ``y = W x`` that it is, or the view that it makes.
"""
