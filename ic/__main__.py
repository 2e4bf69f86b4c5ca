from ic.cli import main

main()
