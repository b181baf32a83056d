def full_size(settings): yield from ()
