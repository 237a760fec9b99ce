"""Models of other software, read and written: `megacl convert SRC DST --to FORMAT`.

opened.py: a model in any format as megacl's tensors by megacl's names, read one at a time. layouts.py: the orders in
which formats lay a tensor's rows, as pure functions both ways. mapping.py: a table a format, from megacl's names to its
own; one table serves reading and writing. detect.py: which format a path is. The other modules are a format each.
"""
