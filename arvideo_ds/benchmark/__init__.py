"""What a training step costs: time, memory, operations, operators.

Measures the step that training makes, out of the same model, engine and loader; it knows no run
folder and writes no files.
"""
