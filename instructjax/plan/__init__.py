"""What a recipe takes, before there is anything to run it on: `python -m instructjax.plan`."""
