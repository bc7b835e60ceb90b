pub(super) const EXTENSIONS: [&str; 14] = ["jpg", "jpeg", "jpe", "jfif", "png", "webp", "bmp", "dib", "tif", "tiff", "ppm", "pgm", "pbm", "gif"];
