"""Entry point of `python -m alexnet_jax.main`, the same as `alexnet_jax train`."""

from alexnet_jax.commands import app, train

if __name__ == '__main__':
    app.run(train)
