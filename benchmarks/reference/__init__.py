"""Published one-layer solvers, written from their papers, to measure the package's own against.

One algorithm a file, arrays in and out, NumPy or CuPy. ``weight`` is (n, m), one row an output;
``second`` is the centred second moment C (m, m) of the layer's input, so that every method gets the
exact bias that the package's solver gets. Iterations run in float32, as in the authors' own programs.
"""
