"""The convex problem and its solvers: tensors only, no model.

What comes in: the second moments ``R = E[x x^T]`` and ``B = E[y x^T]`` of one or more layers, and which columns form a
group (`Block`, `GroupLasso` in ``problem``). What goes out: the solution of
``min_M 1/2 E||y - M x||^2 + lam sum_g w_g ||M[:, g]||_F``, certified by its duality gap (``solve``), along a path of
penalties or for a given number of groups (``path``); the least-squares refit on a support (`debias`); and supports
found without a penalty, by backward elimination (``backward``) and by exchanges (``exchange``). ``prox`` is the
proximal operator; ``newton``, ``fista``, ``proximal_gradient`` and ``alternate_minimization`` are the solvers;
``least_squares`` handles a singular R.
"""
