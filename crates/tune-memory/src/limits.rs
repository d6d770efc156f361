//! What the machine and the control groups of this process leave.
//!
//! A container's limit is in its control group, and a group cannot have more than those above it: of version 2 every
//! `memory.max`, of version 1 every `memory.limit_in_bytes` from the process's group up to the root counts. Page cache
//! that nobody has used lately is counted as used by a group but gives way first, so it is left out.

use std::fs;
use std::path::{Path, PathBuf};

use crate::resident::field;

/// `MemAvailable` of Linux, or what a control group has left, where that is less. `None` where the system does not
/// tell.
pub fn available_bytes() -> Option<u64> {
    available_under(Path::new("/"))
}

/// Memory of the whole machine. `None` where the system does not tell.
pub fn total_bytes() -> Option<u64> {
    field(&fs::read_to_string("/proc/meminfo").ok()?, "MemTotal:")
}

/// [`available_bytes`] with the system's folders under `root`.
fn available_under(root: &Path) -> Option<u64> {
    let meminfo = fs::read_to_string(root.join("proc/meminfo")).ok()?;
    let system = field(&meminfo, "MemAvailable:")?;
    Some(groups(root).iter().filter_map(Group::left).fold(system, u64::min))
}

/// One control group with a memory controller.
struct Group {
    folder: PathBuf,
    files: [&'static str; 3],
}

const VERSION_2: [&str; 3] = ["memory.max", "memory.current", "inactive_file "];
const VERSION_1: [&str; 3] = ["memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file "];

impl Group {
    /// Limit − use; `None` without a limit.
    fn left(&self) -> Option<u64> {
        let [limit, used, idle] = self.files;
        let read = |file| fs::read_to_string(self.folder.join(file)).ok();
        let number = |file| read(file)?.trim().parse::<u64>().ok();
        let idle = read("memory.stat")
            .and_then(|text| text.lines().find_map(|line| line.strip_prefix(idle)?.trim().parse().ok()));
        Some(number(limit)?.saturating_sub(number(used)?.saturating_sub(idle.unwrap_or(0))))
    }
}

/// The groups of this process and those above them, of both versions.
fn groups(root: &Path) -> Vec<Group> {
    let mut groups = Vec::new();
    let lines = fs::read_to_string(root.join("proc/self/cgroup")).unwrap_or_default();
    let mounted = root.join("sys/fs/cgroup");
    for line in lines.lines() {
        let mut parts = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (parts.next(), parts.next()) else { continue };
        let (mounts, files) = match controllers {
            "" => ([mounted.clone(), mounted.join("unified")], VERSION_2),
            list if list.split(',').any(|controller| controller == "memory") => {
                ([mounted.join("memory"), mounted.clone()], VERSION_1)
            }
            _ => continue,
        };
        for mount in mounts {
            // Inside a container the path is often that of the host and not there: then the mount itself is the group.
            let within = Path::new(path.trim_start_matches('/')).ancestors();
            groups.extend(within.map(|group| Group { folder: mount.join(group), files }));
        }
    }
    groups
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    fn system(files: &[(&str, String)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().expect("temporary folder");
        let meminfo = ("proc/meminfo", "MemTotal: 16777216 kB\nMemAvailable:    8388608 kB\n".to_string());
        for (path, content) in files.iter().chain([&meminfo]) {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().expect("a folder")).expect("created");
            fs::write(path, content).expect("written");
        }
        root
    }

    #[test]
    fn without_groups_the_system_decides() {
        assert_eq!(available_under(system(&[]).path()), Some(8 * GIB));
        let unlimited = system(&[
            ("proc/self/cgroup", "0::/\n".into()),
            ("sys/fs/cgroup/memory.max", "max\n".into()),
            ("sys/fs/cgroup/memory.current", "12345\n".into()),
        ]);
        assert_eq!(available_under(unlimited.path()), Some(8 * GIB));
        assert_eq!(available_under(Path::new("/nowhere")), None);
    }

    #[test]
    fn a_container_of_version_2_has_what_its_limit_leaves() {
        let root = system(&[
            ("proc/self/cgroup", "0::/\n".into()),
            ("sys/fs/cgroup/memory.max", (2 * GIB).to_string()),
            ("sys/fs/cgroup/memory.current", GIB.to_string()),
            ("sys/fs/cgroup/memory.stat", format!("anon 1\ninactive_file {}\n", GIB / 4)),
        ]);
        assert_eq!(available_under(root.path()), Some(GIB + GIB / 4));
    }

    #[test]
    fn a_group_cannot_have_more_than_the_one_above_it() {
        let root = system(&[
            ("proc/self/cgroup", "0::/user.slice/run.scope\n".into()),
            ("sys/fs/cgroup/user.slice/memory.max", (3 * GIB).to_string()),
            ("sys/fs/cgroup/user.slice/memory.current", GIB.to_string()),
            ("sys/fs/cgroup/user.slice/run.scope/memory.max", "max".into()),
            ("sys/fs/cgroup/user.slice/run.scope/memory.current", "1".into()),
        ]);
        assert_eq!(available_under(root.path()), Some(2 * GIB));
    }

    #[test]
    fn a_container_of_version_1_has_what_its_limit_leaves() {
        let root = system(&[
            ("proc/self/cgroup", "5:cpuset:/\n3:cpu,memory:/docker/0123abcd\n0::/\n".into()),
            ("sys/fs/cgroup/memory/memory.limit_in_bytes", (4 * GIB).to_string()),
            ("sys/fs/cgroup/memory/memory.usage_in_bytes", (3 * GIB).to_string()),
            ("sys/fs/cgroup/memory/memory.stat", format!("total_inactive_file {GIB}\n")),
        ]);
        assert_eq!(available_under(root.path()), Some(2 * GIB));
    }

    #[test]
    fn a_group_that_is_full_leaves_nothing() {
        let root = system(&[
            ("proc/self/cgroup", "0::/\n".into()),
            ("sys/fs/cgroup/memory.max", GIB.to_string()),
            ("sys/fs/cgroup/memory.current", (2 * GIB).to_string()),
        ]);
        assert_eq!(available_under(root.path()), Some(0));
    }
}
