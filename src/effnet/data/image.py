"""A photo from a file, stream, Pillow image or array -> a network's input array. Pillow and numpy only.

`open_photo` decodes it, upright and with 8 bits per channel:

    EXIF orientation           applied; if the EXIF data is unreadable, the pixels stay as stored
    transparency               composed over white
    CMYK, YCbCr, LAB, palette  converted to RGB by Pillow, which also handles Adobe's inverted CMYK
    more bits per channel      scaled from the range of the values (bit_depth.py)
    animations                 the first frame; of a TIFF the first page

torchvision's and timm's readers only call Pillow's `convert("RGB")`: they ignore the EXIF orientation, show the colour
of transparent pixels, mostly black, and clip 16-bit, 32-bit and float pixels at 255. Like them, effnet ignores colour
profiles (ICC) and the transparent colour of a 16-bit RGB PNG, which Pillow does not support.

`preprocess` does the rest by an InputSpec. For the same decoded image it equals the evaluation transforms of
torchvision and timm bit for bit:

    fit="crop"    torchvision's `ImageClassification` (Resize, CenterCrop, ToTensor, Normalize), and timm's transform
                  with crop_mode="center", whose `resize` is floor(size / crop_pct)
    fit="squash"  timm's crop_mode="squash" at crop_pct=1
    fit="pad"     timm's crop_mode="border" at crop_pct=1; very narrow photos keep 1 pixel where timm fails

The paper does not say how ImageNet's photos were prepared. The official code first crops the middle size / (size + 32)
of the photo and then resizes it, bicubic without antialiasing; torchvision's and timm's weights expect their own
transforms.
"""

from __future__ import annotations

import io
import math
import struct
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from os import PathLike
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageFile

from effnet.arch.spec import InputSpec
from effnet.data.bit_depth import RANGES, load_colours, narrow_grey, note_bits
from effnet.data.scans import check_scans
from effnet.data.shards import open_file
from effnet.errors import ArgumentError, ImageError, optional_import
from effnet.fields import one_of

ColourMode = Literal["RGB", "L"]
PhotoSource = str | PathLike[str] | BinaryIO | Image.Image | npt.NDArray[np.uint8]
Size = tuple[int, int]  # width, height

PHOTOS = Path(__file__).with_name("photos")  # two photos to compare engines and precisions on
PIXEL_LIMIT = 178_956_970  # Pillow's own limit: 0.7 GB once decoded
HALVINGS = 3  # then a JPEG's block of 8 x 8 pixels has become one pixel
HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx")
SHARED_BRANDS = (b"mif1", b"msf1")  # HEIC or AVIF, which Pillow reads itself
COMMON = {b"\xff\xd8\xff": "PIL.JpegImagePlugin", b"\x89PNG\r\n\x1a\n": "PIL.PngImagePlugin"}  # by their first bytes
REFUSED = ("EPS",)  # Pillow would run Ghostscript
UNCUT_LIMIT = 2**25  # pixels of a resized photo before its crop, 134 MB: an aspect ratio of 512 at resize=256
REACH = 4  # source pixels on either side that the widest filter, Lanczos, uses when it enlarges, plus one
RESOLUTION_STEP = 16  # pixels: the stride of a network whose stem has stride 1
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # by EXIF orientation
QUARTERS = [TURNS[orientation] for orientation in (5, 6, 7, 8)]  # which exchange width and height


def load_pixels(
    source: PhotoSource, spec: InputSpec, *, spare: float | None = None, gap: float | None = None
) -> npt.NDArray[np.uint8]:
    """`source` before normalisation: (size, size, C) uint8; by default equal to torchvision's, bit for bit.

    Args:
        source: see `open_photo`.
        spec: how it is prepared.
        spare: a JPEG is halved while it is decoded, which takes a fraction of the time, as long as it stays this many
            times larger than the resized photo.
        gap: see `fit_photo`.

    Raises:
        ImageError, ArgumentError: see `open_photo`.
    """
    least = None if spare is None else spare * (spec.resize if spec.fit == "crop" else spec.size)
    return fit_photo(open_photo(source, colour_mode(spec), least=least, longer=spec.fit == "pad"), spec, gap)


def open_photo(
    source: PhotoSource, mode: ColourMode = "RGB", *, least: float | None = None, longer: bool = False
) -> Image.Image:
    """The photo in `source`: decoded, upright, 8 bits per channel, as described in the module's docstring.

    Args:
        source: a path, an open binary file (read from the start if it is seekable), a Pillow image, or an array
            (H, W), (H, W, 1), (H, W, 3) or (H, W, 4) of uint8: grey, grey, RGB or RGBA.
        mode: "RGB", or "L" for greyscale (ITU-R 601 luma).
        least: pixels that the shorter side keeps when a JPEG is halved while it is decoded, up to three times and only
            while both sides are even; None decodes it in full.
        longer: whether `least` refers to the longer side.

    Returns:
        An image of that mode; `source` itself if it is one and upright.

    Raises:
        ImageError: the photo cannot be read; the message is the reason without the file's name.
        ArgumentError: `mode` is unknown, or `source` is not a photo, such as an array of another shape.
    """
    one_of("mode", mode, ColourMode)
    try:
        if isinstance(source, np.ndarray):
            return _flatten(_from_array(source), mode)
        if isinstance(source, Image.Image):
            return _turn_upright(source, mode)
        if isinstance(source, (str, PathLike)):
            with open_file(source) as file:
                return _turn_upright(_halve(identify(file), least, longer), mode)
        if hasattr(source, "read"):
            return _turn_upright(_halve(identify(source), least, longer), mode)
    except (ImageError, ArgumentError):
        raise
    except Exception as error:  # decoders may raise anything
        raise ImageError(explain_error(error)) from error
    raise ArgumentError("source", source, "must be a path, an open binary file, a Pillow image or an array.")


def identify(file: BinaryIO) -> ImageFile.ImageFile:
    """The undecoded image in `file`: `Image.open` without its warning about large images and without REFUSED.

    The warning could only be silenced for all threads at once. Without a file name Pillow does not map the file into
    memory, so a file that shrinks later cannot crash the process.

    Raises:
        ImageError: it is not an image, or it is damaged.
    """
    if not file.seekable():
        file = io.BytesIO(file.read())
    file.seek(0)
    prefix, complaint = file.read(16), "is not an image, or of a format that Pillow cannot read."
    if not prefix:
        raise ImageError("is empty: 0 bytes.")
    brand = prefix[8:12] if prefix[4:8] == b"ftyp" else b""
    if brand in HEIC_BRANDS or (brand in SHARED_BRANDS and find_spec("pillow_heif")):
        _register_heif()
    for name in _formats(prefix):
        factory, accepts = Image.OPEN[name]
        try:
            file.seek(0)
            if accepts is None or accepts(prefix.ljust(16, b"\0")) is True:
                image = factory(file, "")
                note_bits(image, file)
                if name == "JPEG":
                    check_scans(file)
                return image
        except ImageError:
            raise
        except (SyntaxError, IndexError, TypeError, struct.error) as error:
            if accepts:  # the signature matches
                complaint = f"is a damaged {name} file ({error})."
        except Exception as error:
            raise ImageError(explain_error(error)) from error
    raise ImageError(complaint)


def _formats(prefix: bytes) -> Iterator[str]:
    """Pillow's formats, likeliest first; each is imported when it is reached, since all of them take 40 ms."""
    tried = set(REFUSED)
    own = [partial(import_module, module) for mark, module in COMMON.items() if prefix.startswith(mark)]
    steps: list[Callable[[], object]] = [*own, Image.preinit, Image.init]
    for step in steps:
        step()
        for name in [name for name in Image.ID if name not in tried]:
            tried.add(name)
            yield name


def _register_heif() -> None:
    """Let Pillow read HEIC and HEIF, which needs a separate package.

    Raises:
        ImageError: it is not installed.
    """
    try:
        with optional_import("reading HEIC images"):
            from pillow_heif import register_heif_opener
    except ImportError as error:
        raise ImageError(f"is a HEIC image; {error}") from error
    register_heif_opener()


def turn_of(image: Image.Image) -> Image.Transpose | None:
    """The transpose that makes an image upright by its EXIF data; None if it is upright, or the EXIF data is broken."""
    try:
        return TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # cameras and editors write broken EXIF data for good pixels
        return None


def colour_mode(spec: InputSpec) -> ColourMode:
    """The mode of photos for `spec`: "L" for one channel, "RGB" for three.

    Raises:
        ArgumentError: it has another number of channels.
    """
    if spec.channels not in (1, 3):
        raise ArgumentError("input", f"{spec.channels} channels", "cannot be a photo's, which has 1 or 3: pass arrays.")
    return "L" if spec.channels == 1 else "RGB"


def fit_photo(photo: Image.Image, spec: InputSpec, gap: float | None = None) -> npt.NDArray[np.uint8]:
    """`photo`, as `open_photo` returns it, resized and cropped, padded or squashed to (size, size, C) uint8.

    With `gap`, a larger photo is first averaged over squares of whole pixels, as long as it stays this many times
    larger than the resized photo (at least 1), and what the crop cuts off is not resized: about half the time. At 2,
    photos differ from the exact result by up to 5 levels of 255, by less than half a level on average; noise by more.

    Raises:
        ArgumentError: its mode is not `colour_mode(spec)`.
    """
    if photo.mode != colour_mode(spec):
        raise ArgumentError("photo.mode", photo.mode, f"must be {colour_mode(spec)!r} for {spec.channels} channels.")
    fits = {"crop": _crop, "pad": _pad, "squash": _squash}
    pixels = np.array(fits[spec.fit](photo, spec, gap))  # a copy, since torch warns about read-only arrays
    return pixels.reshape(spec.size, spec.size, spec.channels)


def views(input_spec: InputSpec, count: int) -> npt.NDArray[np.uint8]:
    """Random crops of the packaged photos, (count, size, size, C); noise for other numbers of channels."""
    random = np.random.default_rng(0)
    if input_spec.channels not in (1, 3):
        shape = count, input_spec.size, input_spec.size, input_spec.channels
        return random.integers(0, 256, shape, dtype=np.uint8)
    photos = [open_photo(file, colour_mode(input_spec)) for file in sorted(PHOTOS.glob("*.png"))]
    found = []
    for number in range(count):
        photo = photos[number % len(photos)]
        share = random.uniform(0.6, 1)  # of the sides
        left, top = (random.uniform(0, side * (1 - share)) for side in photo.size)
        box = round(left), round(top), round(left + share * photo.width), round(top + share * photo.height)
        crop = fit_photo(photo.crop(box), input_spec)
        found.append(crop[:, ::-1] if random.random() < 0.5 else crop)
    return np.stack(found)


def natural_resolution(side: int) -> int:
    """The resolution at which images with this shorter side, in pixels, are barely enlarged."""
    return max(2 * RESOLUTION_STEP, RESOLUTION_STEP * -(-side // RESOLUTION_STEP))


def _from_array(pixels: npt.NDArray[Any]) -> Image.Image:
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[:, :, 0]
    if pixels.dtype != np.uint8 or not pixels.size or pixels.shape[2:] not in ((), (3,), (4,)) or pixels.ndim < 2:
        found = f"array of {pixels.dtype}, shape {pixels.shape}"
        raise ArgumentError("source", found, "must be uint8 of shape (H, W), (H, W, 1), (H, W, 3) or (H, W, 4).")
    return Image.fromarray(pixels)


def _halve(image: ImageFile.ImageFile, least: float | None, longer: bool) -> ImageFile.ImageFile:
    """Set a JPEG to be halved while it is decoded; only while its sides are even, since rounding shifts the photo."""
    if least is not None and image.format == "JPEG":
        width, height = image.size
        whole = ((width | height) & -(width | height)).bit_length() - 1
        spare = (max if longer else min)(width, height) / least
        halvings = min(HALVINGS, whole, math.floor(math.log2(max(1.0, spare))))
        if halvings > 0:
            image.draft(None, (width >> halvings, height >> halvings))
    return image


def _turn_upright(image: Image.Image, mode: ColourMode) -> Image.Image:
    width, height = image.size
    if not 0 < width * height <= PIXEL_LIMIT:
        raise ImageError(f"has {width} x {height} pixels; from 1 to {PIXEL_LIMIT} are read.")
    image = load_colours(image)
    turn = turn_of(image)
    photo = _flatten(image, mode)
    if turn is not None:
        photo = photo.transpose(turn)
        photo.info.clear()  # its EXIF data would turn it again
    return photo


def _flatten(image: Image.Image, mode: ColourMode) -> Image.Image:
    if image.mode in RANGES or image.mode.startswith("I;16"):
        image = narrow_grey(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        canvas = Image.new("RGB", image.size, "white")
        canvas.paste(image, mask=image)
        image = canvas
    if image.mode != mode and image.mode not in ("1", "L"):
        image = image.convert("RGB")  # the only conversion of LAB
    return image if image.mode == mode else image.convert(mode)


def explain_error(error: Exception) -> str:
    """Why an image could not be read."""
    match error:
        case FileNotFoundError():
            return "does not exist."
        case IsADirectoryError():
            return "is a folder, not an image."
        case PermissionError():
            return "cannot be opened: permission denied."
        case MemoryError():
            return "needs more memory than there is."
        case Image.DecompressionBombError():
            return f"has more than {PIXEL_LIMIT} pixels."
        case OSError() if error.strerror:
            return f"cannot be read: {error.strerror}."
        case _:
            return f"is damaged or cut short ({str(error) or type(error).__name__})."


def _crop(photo: Image.Image, spec: InputSpec, gap: float | None) -> Image.Image:
    """Resize the shorter side to `resize`, the longer one rounded down; then take the middle."""
    shorter = min(photo.size)
    width, height = (int(spec.resize * side / shorter) for side in photo.size)
    left, top = round((width - spec.size) / 2), round((height - spec.size) / 2)  # half to even, as in torchvision
    if width * height > UNCUT_LIMIT:
        return _crop_first(photo, (width, height), (left, top), spec)
    if gap is not None:
        across, down = photo.width / width, photo.height / height
        box = left * across, top * down, (left + spec.size) * across, (top + spec.size) * down
        return photo.resize((spec.size, spec.size), _filter(spec), box, gap)
    resized = photo.resize((width, height), _filter(spec))
    return resized.crop((left, top, left + spec.size, top + spec.size))


def _crop_first(photo: Image.Image, resized: Size, corner: Size, spec: InputSpec) -> Image.Image:
    """The same from only the pixels that the crop needs: bounded memory, within 2 levels where it enlarges.

    Pillow stores the box in float32, so its weights differ in the seventh digit: "nearest" may take the pixel next to
    the right one. When shrinking, Pillow sometimes resizes the height first, which overshoots differently.
    """
    cuts, boxes = [], []
    for side, resized_side, start in zip(photo.size, resized, corner, strict=True):
        scale = side / resized_side
        first, last = start * scale, min(side, (start + spec.size) * scale)
        reach = math.ceil(REACH * max(1, scale))
        cuts.append((max(0, math.floor(first) - reach), min(side, math.ceil(last) + reach)))
        boxes.append((first - cuts[-1][0], last - cuts[-1][0]))
    part = photo.crop((cuts[0][0], cuts[1][0], cuts[0][1], cuts[1][1]))
    (left, right), (top, bottom) = boxes
    part = part.resize((spec.size, part.height), _filter(spec), (left, 0, right, part.height))
    return part.resize((spec.size, spec.size), _filter(spec), (0, top, spec.size, bottom))


def _pad(photo: Image.Image, spec: InputSpec, gap: float | None) -> Image.Image:
    """Resize the longer side to `size`, centred on the mean colour; an odd pixel of border goes right or below."""
    ratio = max(photo.size) / spec.size
    width, height = (max(1, round(side / ratio)) for side in photo.size)
    colour = tuple(round(255 * value) for value in spec.mean)
    canvas = Image.new(photo.mode, (spec.size, spec.size), colour if spec.channels > 1 else colour[0])
    resized = photo.resize((width, height), _filter(spec), reducing_gap=gap)
    canvas.paste(resized, ((spec.size - width) // 2, (spec.size - height) // 2))
    return canvas


def _squash(photo: Image.Image, spec: InputSpec, gap: float | None) -> Image.Image:
    return photo.resize((spec.size, spec.size), _filter(spec), reducing_gap=gap)


def _filter(spec: InputSpec) -> Image.Resampling:
    return Image.Resampling[spec.interpolation.upper()]
