"""Layers of torch that hide their weights, computed so that every weight's call can be seen.

``attention`` is for nn.MultiheadAttention, ``recurrent`` for nn.LSTM, nn.GRU, nn.RNN and their cells. Both compute what
torch does.
"""
