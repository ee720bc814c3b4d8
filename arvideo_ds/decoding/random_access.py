"""Frames of an H.264 video by their numbers, decoding only the pictures that these need."""

from __future__ import annotations

import itertools
import operator

import av
import av.error

# H.264 shows a picture at most so many places after its place in the file.
_LARGEST_DELAY = 16
_SEEKS = 4
_IS_HIDDEN = operator.attrgetter("is_discard")
# Types of the NAL units that hold a picture's slices (H.264, table 7-1).
_SLICES = range(1, 6)
_INSTANT_REFRESH = 5


def frames_by_number(
    container: av.container.InputContainer, stream: av.VideoStream, numbers: set[int]
) -> dict[int, av.VideoFrame]:
    """Frames by number; some or all are missing where the file's index does not identify them.

    Seeks to the key frame at or before the first number. A picture to which no target can
    refer, such as most pictures of layered shards, is not decoded.
    """
    frames: dict[int, av.VideoFrame] = {}
    try:
        number_at, packets = needed_packets(container, stream, numbers)
        for packet in (*packets, None):  # None: the last pictures
            for frame in stream.codec_context.decode(packet):
                if frame.pts in number_at:
                    frames[number_at[frame.pts]] = frame
    except av.error.FFmpegError:
        return {}
    return {number: frame for number, frame in frames.items() if number in numbers}


def needed_packets(
    container: av.container.InputContainer, stream: av.VideoStream, numbers: set[int]
) -> tuple[dict[int, int], list[av.Packet]]:
    """Frame number by time, and the packets to decode; both empty where numbers are not certain."""
    index, last = list(stream.index_entries), max(numbers)
    if stream.codec_context.name != "h264" or not last < len(index) == stream.frames:
        return {}, []
    key = next((n for n in range(min(numbers), -1, -1) if index[n].is_keyframe), None)
    # An edit list hides frames.
    if key is None or any(map(_IS_HIDDEN, index)):
        return {}, []
    packets = _packets(container, stream, key, last - key + 1 + _LARGEST_DELAY)
    times = sorted({packet.pts for packet in packets if packet.pts is not None})
    if len(times) != len(packets) or any(packet.is_corrupt for packet in packets):
        return {}, []
    # Of a group that is not closed, frames before the key frame come after it in the file.
    if not times or times[0] != packets[0].pts:
        return {}, []
    number_at = dict(zip(times, itertools.count(key)))
    wanted = [number_at[packet.pts or 0] in numbers for packet in packets]
    return number_at, _needed(packets, wanted, _length_bytes(stream))


def _needed(packets: list[av.Packet], wanted: list[bool], length_bytes: int) -> list[av.Packet]:
    """The target pictures, and earlier ones that they may refer to."""
    needed = []
    leads_to_wanted = False
    for packet, is_wanted in zip(reversed(packets), reversed(wanted), strict=True):
        leads_to_wanted |= is_wanted
        if leads_to_wanted:
            kind, is_reference = _first_slice(packet, length_bytes)
            if is_wanted or is_reference:
                needed.append(packet)
            # Pictures after it never refer to pictures before it.
            leads_to_wanted = kind != _INSTANT_REFRESH
    return needed[::-1]


def _packets(
    container: av.container.InputContainer, stream: av.VideoStream, first: int, count: int
) -> list[av.Packet]:
    """Packets from the first on, in the order of the file; none where seeking does not find it."""
    index = stream.index_entries
    # The index has times of decoding, and seeking takes times of showing, a little later.
    for entry in itertools.islice(index, first, first + _SEEKS):
        container.seek(entry.timestamp, stream=stream, backward=True)
        packets = itertools.islice(container.demux(stream), count)
        packet = next(packets)
        if packet.dts == index[first].timestamp:
            return [packet, *(packet for packet in packets if packet.size)]
    return []


def _length_bytes(stream: av.VideoStream) -> int:
    """Bytes of the length before each NAL unit; 0 if they are separated by start codes."""
    header = stream.codec_context.extradata or b""
    return (header[4] & 3) + 1 if len(header) > 4 and header[0] == 1 else 0


def _first_slice(packet: av.Packet, length_bytes: int) -> tuple[int, bool]:
    """Type of a picture's first slice, and whether other pictures may refer to it (nal_ref_idc);
    (0, True) where it is not found."""
    data, at = memoryview(packet), 0
    while length_bytes and at + length_bytes < len(data):
        unit = data[at + length_bytes]
        if unit & 31 in _SLICES:
            return unit & 31, bool(unit >> 5)
        at += length_bytes + int.from_bytes(data[at : at + length_bytes], "big")
    return 0, True
