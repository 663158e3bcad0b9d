"""`python -m launch VERB …`: the command line where the entry point is not on the path."""

from launch.main import main

main()
