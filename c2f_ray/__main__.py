from c2f_ray.cli import main

main()
