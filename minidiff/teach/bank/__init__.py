"""The exercises: NN.py belongs to notebook NN and holds solutions, known wrong answers and how they are compared."""
