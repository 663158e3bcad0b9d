"""Run `python -m launch VERB …`: the command line for when `lctrain` is not on the path."""

from launch.main import main

main()
