# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the kernel's headers say of loop devices: constants and structs under their own names.

Nothing here does anything; the calls are in `kernel`.
"""

import ctypes
import os

LOOP_MAJOR = 7

# include/uapi/linux/loop.h
LOOP_SET_FD = 0x4C00
LOOP_CLR_FD = 0x4C01
LOOP_SET_STATUS64 = 0x4C04
LOOP_GET_STATUS64 = 0x4C05
LOOP_SET_CAPACITY = 0x4C07
LOOP_SET_DIRECT_IO = 0x4C08
LOOP_SET_BLOCK_SIZE = 0x4C09
LOOP_CONFIGURE = 0x4C0A
LOOP_CTL_ADD = 0x4C80
LOOP_CTL_REMOVE = 0x4C81
LOOP_CTL_GET_FREE = 0x4C82

LO_NAME_SIZE = 64
MAX_REFERENCE = LO_NAME_SIZE - 2  # udev ignores a name that fills the kernel's 63
LO_FLAGS_READ_ONLY = 1
LO_FLAGS_AUTOCLEAR = 4
LO_FLAGS_PARTSCAN = 8
LO_FLAGS_DIRECT_IO = 16
# What LOOP_SET_STATUS64 heeds; the rest has calls of its own.
LOOP_SET_STATUS_SETTABLE_FLAGS = LO_FLAGS_AUTOCLEAR | LO_FLAGS_PARTSCAN

# include/uapi/asm-generic/ioctl.h, and the few architectures with an ioctl.h of their own
_OWN = os.uname().machine.startswith(("alpha", "mips", "ppc", "sparc"))
_IO = 1 << 29 if _OWN else 0
_IOR = 2 << 29 if _OWN else 2 << 30

# include/uapi/linux/fs.h and blkpg.h
BLKFLSBUF = _IO | 0x1261
BLKSSZGET = _IO | 0x1268
BLKPG = _IO | 0x1269
BLKGETSIZE64 = _IOR | ctypes.sizeof(ctypes.c_size_t) << 16 | 0x1272
BLKGETDISKSEQ = _IOR | 8 << 16 | 0x1280
BLKPG_ADD_PARTITION = 1
BLKPG_DEL_PARTITION = 2
BLKPG_RESIZE_PARTITION = 3
# include/linux/genhd.h, not exported: numbers go to one less.
DISK_MAX_PARTS = 256

# include/uapi/linux/stat.h and fcntl.h
AT_EMPTY_PATH = 0x1000
AT_STATX_DONT_SYNC = 0x4000
STATX_BASIC_STATS = 0x7FF
STATX_MNT_ID = 0x1000
STATX_DIOALIGN = 0x2000
STATX_MNT_ID_UNIQUE = 0x4000
STATX_ATTR_IMMUTABLE = 0x10
STATX_ATTR_APPEND = 0x20


# include/uapi/linux/nsfs.h, mount.h and the table of system calls
NS_MNT_GET_NEXT = _IOR | 16 << 16 | 0xB70B
NS_MNT_GET_PREV = _IOR | 16 << 16 | 0xB70C
SYS_STATMOUNT = 567 if os.uname().machine.startswith("alpha") else 457
STATMOUNT_SB_BASIC = 1

# include/linux/exportfs.h, the types of handles that no other filesystem has; btrfs.h
FILEID_BTRFS = frozenset((0x4D, 0x4E, 0x4F))
BTRFS_IOC_FS_INFO = _IOR | 1024 << 16 | 0x941F


class loop_info64(ctypes.Structure):  # noqa: N801  the kernel's name
    """struct loop_info64."""

    lo_device: int
    lo_inode: int
    lo_rdevice: int
    lo_offset: int
    lo_sizelimit: int
    lo_number: int
    lo_flags: int
    lo_file_name: bytes
    _fields_ = (
        ("lo_device", ctypes.c_uint64),
        ("lo_inode", ctypes.c_uint64),
        ("lo_rdevice", ctypes.c_uint64),
        ("lo_offset", ctypes.c_uint64),
        ("lo_sizelimit", ctypes.c_uint64),
        ("lo_number", ctypes.c_uint32),
        ("lo_encrypt_type", ctypes.c_uint32),
        ("lo_encrypt_key_size", ctypes.c_uint32),
        ("lo_flags", ctypes.c_uint32),
        ("lo_file_name", ctypes.c_char * LO_NAME_SIZE),
        ("lo_crypt_name", ctypes.c_char * LO_NAME_SIZE),
        ("lo_encrypt_key", ctypes.c_uint8 * 32),
        ("lo_init", ctypes.c_uint64 * 2),
    )


class loop_config(ctypes.Structure):  # noqa: N801  the kernel's name
    """struct loop_config, the argument of LOOP_CONFIGURE."""

    fd: int
    block_size: int
    info: loop_info64
    _fields_ = (
        ("fd", ctypes.c_uint32),
        ("block_size", ctypes.c_uint32),
        ("info", loop_info64),
        ("reserved", ctypes.c_uint64 * 8),
    )


class blkpg_partition(ctypes.Structure):  # noqa: N801  the kernel's name
    """struct blkpg_partition; start and length in bytes."""

    _fields_ = (
        ("start", ctypes.c_longlong),
        ("length", ctypes.c_longlong),
        ("pno", ctypes.c_int),
        ("devname", ctypes.c_char * 64),
        ("volname", ctypes.c_char * 64),
    )


class blkpg_ioctl_arg(ctypes.Structure):  # noqa: N801  the kernel's name
    """struct blkpg_ioctl_arg."""

    _fields_ = (
        ("op", ctypes.c_int),
        ("flags", ctypes.c_int),
        ("datalen", ctypes.c_int),
        ("data", ctypes.POINTER(blkpg_partition)),
    )


class flock64(ctypes.Structure):  # noqa: N801  the kernel's name
    """struct flock64."""

    l_type: int
    l_start: int
    l_len: int
    l_pid: int
    _fields_ = (
        ("l_type", ctypes.c_short),
        ("l_whence", ctypes.c_short),
        ("l_start", ctypes.c_longlong),
        ("l_len", ctypes.c_longlong),
        ("l_pid", ctypes.c_int),
    )


class file_handle(ctypes.Structure):  # noqa: N801  the kernel's name
    """struct file_handle with the most room that there can be."""

    handle_bytes: int
    handle_type: int
    _fields_ = (
        ("handle_bytes", ctypes.c_uint),
        ("handle_type", ctypes.c_int),
        ("f_handle", ctypes.c_uint8 * 128),
    )


class btrfs_ioctl_fs_info_args(ctypes.Structure):  # noqa: N801  the kernel's name
    """The beginning of struct btrfs_ioctl_fs_info_args, and its size."""

    _fields_ = (
        ("max_id", ctypes.c_uint64),
        ("num_devices", ctypes.c_uint64),
        ("fsid", ctypes.c_uint8 * 16),
        ("__rest", ctypes.c_uint8 * 992),
    )


class mnt_ns_info(ctypes.Structure):  # noqa: N801  the kernel's name
    """struct mnt_ns_info."""

    mnt_ns_id: int
    _fields_ = (
        ("size", ctypes.c_uint32),
        ("nr_mounts", ctypes.c_uint32),
        ("mnt_ns_id", ctypes.c_uint64),
    )


class mnt_id_req(ctypes.Structure):  # noqa: N801  the kernel's name
    """struct mnt_id_req, with a namespace (Linux 6.11)."""

    _fields_ = (
        ("size", ctypes.c_uint32),
        ("spare", ctypes.c_uint32),
        ("mnt_id", ctypes.c_uint64),
        ("param", ctypes.c_uint64),
        ("mnt_ns_id", ctypes.c_uint64),
    )


class statmount_buf(ctypes.Structure):  # noqa: N801  the kernel's name
    """struct statmount without what follows STATMOUNT_SB_BASIC, and its size."""

    mask: int
    sb_dev_major: int
    sb_dev_minor: int
    _fields_ = (
        ("size", ctypes.c_uint32),
        ("mnt_opts", ctypes.c_uint32),
        ("mask", ctypes.c_uint64),
        ("sb_dev_major", ctypes.c_uint32),
        ("sb_dev_minor", ctypes.c_uint32),
        ("__rest", ctypes.c_uint8 * 488),
    )


class _statx_timestamp(ctypes.Structure):  # noqa: N801  the kernel's name
    _fields_ = (
        ("tv_sec", ctypes.c_int64),
        ("tv_nsec", ctypes.c_uint32),
        ("__reserved", ctypes.c_int32),
    )


class statx_buf(ctypes.Structure):  # noqa: N801  the kernel's name
    """struct statx."""

    stx_mask: int
    stx_attributes: int
    stx_mode: int
    stx_ino: int
    stx_size: int
    stx_rdev_major: int
    stx_rdev_minor: int
    stx_dev_major: int
    stx_dev_minor: int
    stx_mnt_id: int
    stx_dio_offset_align: int
    _fields_ = (
        ("stx_mask", ctypes.c_uint32),
        ("stx_blksize", ctypes.c_uint32),
        ("stx_attributes", ctypes.c_uint64),
        ("stx_nlink", ctypes.c_uint32),
        ("stx_uid", ctypes.c_uint32),
        ("stx_gid", ctypes.c_uint32),
        ("stx_mode", ctypes.c_uint16),
        ("__spare0", ctypes.c_uint16),
        ("stx_ino", ctypes.c_uint64),
        ("stx_size", ctypes.c_uint64),
        ("stx_blocks", ctypes.c_uint64),
        ("stx_attributes_mask", ctypes.c_uint64),
        ("stx_atime", _statx_timestamp),
        ("stx_btime", _statx_timestamp),
        ("stx_ctime", _statx_timestamp),
        ("stx_mtime", _statx_timestamp),
        ("stx_rdev_major", ctypes.c_uint32),
        ("stx_rdev_minor", ctypes.c_uint32),
        ("stx_dev_major", ctypes.c_uint32),
        ("stx_dev_minor", ctypes.c_uint32),
        ("stx_mnt_id", ctypes.c_uint64),
        ("stx_dio_mem_align", ctypes.c_uint32),
        ("stx_dio_offset_align", ctypes.c_uint32),
        ("__spare3", ctypes.c_uint64 * 12),
    )
