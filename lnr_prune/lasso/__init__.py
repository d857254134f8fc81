"""The convex problem and its solvers: tensors only, no model.

What comes in: second moments ``R = E[x x^T]``, ``B = E[y x^T]`` of one or more layers, and which columns form a group
(`Block`, `GroupLasso` in ``problem``). What goes out: the coefficients of
``min_M 1/2 E||y - M x||^2 + lam sum_g w_g ||M[:, g]||_F``, certified by their duality gap (``solve``), along a path of
penalties or at a count of groups (``path``), their least squares on a support (`debias`), and supports that need no
penalty: backward elimination (``backward``) and exchanges (``exchange``). ``prox`` is the proximal operator;
``newton``, ``fista``, ``proximal_gradient`` and ``alternate_minimization`` are the solvers; ``least_squares`` copes
with singular R.
"""
