"""`python -m alexnet_jax.main` trains, as `alexnet_jax train` does."""

from alexnet_jax.commands import app, train

if __name__ == '__main__':
    app.run(train)
