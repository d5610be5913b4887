"""C++ by which a memory enters the streams: token by token in `tokens`, over the tokens in `convolution`."""
