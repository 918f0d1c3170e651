"""In: a Graph. Out: a Graph that means the same (fold, rotate, fuse) or is quantized (quantize).

Every pass is pure; `recipe` evaluates what the passes wrote into the params. The order in which
passes run is openlpu.compiler.PASSES.
"""
