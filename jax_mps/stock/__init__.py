"""What `accelerate()` replaces: stock JAX operations, recognised as operations of this library.

| file | what is in it |
|---|---|
| `switch.py` | `accelerate()`: turns the replacement on and off |
| `convolution.py` | `conv_general_dilated` as one of the three maps of transposed convolution |
| `windows.py` | `reduce_window` and `select_and_scatter` as poolings |
| `apple.py` | `rev` and `pad`, in what Apple's plugins have |
| `choices.py` | the table that says where ours is used, and why |
| `report.py` | what was lowered, by whose code, and why |

Recognition is a pure function of a primitive's parameters and the types of its operands. It gives an
operation with its arguments, or a reason why there is none. Everything is decided before anything is
lowered.
"""
