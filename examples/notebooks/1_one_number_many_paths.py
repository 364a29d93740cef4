# %% [markdown]
# # One number, many paths
#
# A network is a long formula, and learning asks one question of it: which way, and how much, does
# the result change when this number changes? This lesson answers it with two lines per operation.
# At the end a network that you have trained tells two moons apart.
#
# Ten minutes of reading, four exercises. Each is a cell with `...` in it; the cell below checks it.

# %%
import inspect

import numpy as np

import tinyseg as ts
from tinyseg import arithmetic, nn, ops, page, pictures

# %% [markdown]
# ## An operation is a value and its pull-backs
#
# A tensor is an array that remembers where it came from. Here it is a single number.

# %%
x = ts.Tensor(np.array(3.0), requires_grad=True)
w = ts.Tensor(np.array(-0.5), requires_grad=True)
y = ops.tanh(x * w) * x + x * x
y.backward()
print(f"y = {y:.4f}, dy/dx = {x.grad:.4f}, dy/dw = {w.grad:.4f}")

# %% [markdown]
# Where do these two numbers come from? Each operation returns its value and, for each input, a
# *pull-back*: a function that is given `g`, the derivative of the final result in this operation's
# answer, and returns the derivative of the final result in that input: `g` times the operation's
# own derivative. This is the whole of multiplication:

# %%
print(inspect.getsource(arithmetic.multiply))

# %% [markdown]
# `backward` starts with 1 at the end, and pulls it back through one operation after the other. The
# picture has what goes along every edge, the wider the larger. `x` is used four times; its gradient
# is the **sum** of what arrives on its four paths.

# %%
x.grad = w.grad = None
y = ops.tanh(x * w) * x + x * x
page.figure(pictures.graph, y, {"x": x, "w": w, "y": y})

# %% [markdown]
# ## Exercise 1: write a pull-back
#
# `ts.op` makes an operation of a function of arrays. The sigmoid is $y = 1 / (1 + e^{-x})$, and
# $dy/dx = y (1 - y)$. Write its pull-back: what becomes of the gradient `g` that arrives?

# %% tags=["exercise"]
@ts.op
def sigmoid(x):
    y = 1 / (1 + np.exp(-x))
    return y, (lambda g: ...,)

# %% [markdown]
# The check compares it with differences, along a random direction of the input and for a random
# gradient of the output.

# %% tags=["check"]
numbers = np.random.default_rng(0).standard_normal((3, 4))
error = ts.check_gradients(sigmoid, numbers)
print(f"right: the largest error is {error:.0e}")

# %% [markdown] tags=["solution"]
# <details><summary>Hint</summary>
#
# A pull-back multiplies what arrives by the derivative, number by number. `y` is still there.
# </details>
# <details><summary>Solution</summary>
#
# ```python
# @ts.op
# def sigmoid(x):
#     y = 1 / (1 + np.exp(-x))
#     return y, (lambda g: g * y * (1 - y),)
# ```
# </details>

# %% [markdown]
# ## Exercise 2: a value used twice
#
# Before you run anything: $z = x \cdot x \cdot x + 2x$ at $x = 3$. What will `x.grad` be, and along
# how many edges does it arrive?

# %% tags=["exercise"]
gradient = ...
edges = ...

# %% tags=["check"]
x = ts.Tensor(np.array(3.0), requires_grad=True)
arriving = [size for _, before, size in pictures.flow(x * x * x + 2 * x) if before is x]
assert gradient == x.grad, f"not {gradient}: differentiate x³ + 2x, and put in 3"
assert edges == len(arriving), f"not {edges}: count how often x stands in the formula"
print("right:", " + ".join(f"{size:g}" for size in arriving), "=", x.grad)

# %% [markdown] tags=["solution"]
# <details><summary>Hint</summary>
#
# Every x in the formula is an edge. The derivative does not care how it was written.
# </details>
# <details><summary>Solution</summary>
#
# ```python
# gradient = 3 * 3**2 + 2
# edges = 4
# ```
# </details>

# %% [markdown]
# ## Exercise 3: one of these is broken
#
# Three ways to transpose a matrix. All three give the right value, and one has a wrong pull-back. A
# friend tests them with a gradient of ones, as many do, and finds nothing.

# %%
@ts.op
def first(x):
    return x.T, (lambda g: g.T,)


@ts.op
def second(x):
    return x.swapaxes(0, 1), (lambda g: g.reshape(x.shape),)


@ts.op
def third(x):
    return x.transpose(1, 0), (lambda g: g.transpose(1, 0),)

# %%
for way in (first, second, third):
    matrix = ts.Tensor(numbers, requires_grad=True)
    way(matrix).backward(np.ones((4, 3)))
    print(way.__name__, "all ones:", bool((matrix.grad == 1).all()))

# %% [markdown]
# Find the broken one by a check that cannot be fooled like that.

# %% tags=["exercise"]
broken = ...

# %% tags=["check"]
assert broken in (first, second, third), "name one of the three functions, without quotes"
try:
    ts.check_gradients(broken, numbers)
except AssertionError as found:
    print("right:", found)
else:
    raise AssertionError(f"{broken.__name__} is right: ts.check_gradients(way, numbers) says so")

# %% [markdown] tags=["solution"]
# <details><summary>Hint</summary>
#
# Try `ts.check_gradients(first, numbers)`. What does reshape do to the order of the numbers?
# </details>
# <details><summary>Solution</summary>
#
# ```python
# broken = second
# ```
# </details>

# %% [markdown]
# ## Exercise 4: two moons
#
# Two layers with a ReLU between. A step is: forward, `backward`, and every parameter a little
# against its gradient.

# %%
def moons(rng, count=200):
    angle, which = rng.uniform(0, np.pi, count), rng.integers(0, 2, count)
    points = np.stack((np.cos(angle), np.sin(angle)), axis=1)
    points = np.where(which[:, None], [1, 0.5] - points, points)
    return (points + 0.1 * rng.standard_normal(points.shape)).astype("float32"), which


def untrained():
    return nn.Sequential(nn.Linear(2, 32, rng=0), nn.ReLU(), nn.Linear(32, 2, rng=1))


points, which = moons(np.random.default_rng(1))
print(untrained())

# %% [markdown]
# Write the two lines that are missing. (`parameter.version += 1` says that it has changed, so that
# no graph of before can be used by mistake.)

# %% tags=["exercise"]
def step(rate=0.5):
    loss = ts.losses.cross_entropy(net(points), which)
    for parameter in net.parameters():
        parameter.grad = None
    ...  # go backward
    for parameter in net.parameters():
        parameter.data[...] = ...  # a little against its gradient
        parameter.version += 1
    return float(loss)

# %% tags=["check"]
net = untrained()
try:
    with np.errstate(all="ignore"):  # a wrong sign goes to infinity
        losses = [step() for _ in range(400)]
except TypeError:
    assert any(p.grad is not None for p in net.parameters()), "no gradients: loss.backward()?"
    raise AssertionError("one of the two lines has no number yet") from None
assert losses[-1] < 0.5 * losses[0], f"the loss went from {losses[0]:.2f} to {losses[-1]:.2f}: " \
    "it is to be parameter.data, minus the rate times parameter.grad"
print(f"right: loss {losses[0]:.2f} to {losses[-1]:.2f}")

# %% [markdown] tags=["solution"]
# <details><summary>Hint</summary>
#
# `loss.backward()` fills `parameter.grad` of every parameter. A step of gradient descent is $p
# \leftarrow p - \text{rate} \cdot \partial \text{loss} / \partial p$.
# </details>
# <details><summary>Solution</summary>
#
# ```python
# def step(rate=0.5):
#     loss = ts.losses.cross_entropy(net(points), which)
#     for parameter in net.parameters():
#         parameter.grad = None
#     loss.backward()
#     for parameter in net.parameters():
#         parameter.data[...] = parameter.data - rate * parameter.grad
#         parameter.version += 1
#     return float(loss)
# ```
# </details>

# %%
grid = np.stack(np.meshgrid(np.linspace(-1.5, 2.5, 120), np.linspace(-1, 1.5, 80)), axis=-1)
with ts.no_grad():
    share = ops.softmax(net(grid.astype("float32")), axis=-1).data[..., 1]
page.figure(pictures.field, share, points, which, (-1.5, 2.5, -1, 1.5))

# %% [markdown]
# What you wrote in `step` is `ts.optim.SGD`; what `backward` does is thirty lines that you can
# read, `walk` in `tinyseg/graph.py`. The next lesson looks at the one operation that does most of
# the work.
