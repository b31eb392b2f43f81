def load_folder(folder, size):
    raise ValueError
