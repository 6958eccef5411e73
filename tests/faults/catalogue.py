"""Every entry of the catalogue of bad input: the code that it has, and the tests that prove it. `test_catalogue.py` holds it to its word."""

from __future__ import annotations

HERE, SETTINGS, CAMERAS = "faults/test_catalogue.py", "faults/test_bad_settings.py", "faults/test_cameras.py"
CHECKS, CAPTURE, INSPECTOR = "devices/test_frame_checks.py", "devices/test_capture.py", "edge_dkm/test_inspector.py"
COMMANDS, BROKER, FAKE = "edge_dkm/test_commands.py", "faults/test_broker_catalogue.py", "faults/test_fake_broker.py"
TLS, STATE, BOX, DISK = (
    "edge_dkm/test_tls.py",
    "faults/test_state_files.py",
    "edge_dkm/test_outbox_file.py",
    "faults/test_full_disk.py",
)
NOT_RUN, NOT_BUILT = "not run here", "not built"

MISTAKE = f"{SETTINGS}::test_each_mistake_is_refused_with_its_code_on_one_line_and_check_agrees"
FAILING = f"{CAMERAS}::test_a_failing_camera_is_named_and_heals_while_the_other_misses_nothing"
NO_COMMAND = f"{COMMANDS}::test_what_is_no_command_has_a_code_of_its_own"
NO_MODEL = f"{INSPECTOR}::test_a_file_that_is_no_model_is_called_what_it_is"
PICTURE = f"{CHECKS}::test_pictures_that_show_nothing_are_told_from_those_that_do"
CUT_JPEG = f"{CHECKS}::test_a_jpeg_whose_scan_ends_early_is_damaged_wherever_it_ends"
REFUSAL = f"{BROKER}::test_a_refusal_has_its_code_and_says_what_to_do"
CERTIFICATE = f"{TLS}::test_a_wrong_certificate_ends_the_connection_and_is_called_what_it_is"
FULL = f"{DISK}::test_on_a_full_disk_received_and_declared_are_what_was_produced"
RESTRICTED = f"{STATE}::test_a_state_folder_that_cannot_be_written_is_exit_7_with_one_clear_line"
TOPICS = f"{SETTINGS}::test_no_level_of_a_topic_holds_its_special_characters"
NO_FILE = f"{SETTINGS}::test_a_file_that_is_no_file_is_refused"

# row -> entry -> (codes, tests); a test `not run here` or `not built` stands in the guide in these words.
CATALOGUE: dict[str, dict[str, tuple[str, tuple[str, ...]]]] = {
    "Frames": {
        "empty buffer": (
            "F-DECODE",
            ("devices/test_sources.py::test_a_folder_gives_its_images_by_name_and_declares_what_it_cannot_read",),
        ),
        "garbage": (
            "F-DECODE",
            (f"{HERE}::test_what_is_no_usable_picture_is_named", "edge_dkm/test_run.py::test_a_bad_image_is_a_declared_result_and_the_line_goes_on"),
        ),
        "start of a JPEG only": ("F-DAMAGED", (f"{HERE}::test_what_is_no_usable_picture_is_named",)),
        "truncated JPEG": ("F-DAMAGED", (CUT_JPEG, FAILING)),
        "JPEG with a damaged scan": ("F-DAMAGED", (CUT_JPEG, FAILING, f"{CAMERAS}::test_control_without_the_damage_test_half_a_picture_passes")),
        "JPEG with wrong bytes in its middle": (
            "F-DAMAGED",
            ("devices/test_decoder_words.py::test_a_picture_with_wrong_bytes_in_its_middle_is_damaged_in_a_cameras_process",),
        ),
        "wrong size": (
            "F-SHAPE",
            (
                f"{INSPECTOR}::test_a_fixed_size_graph_names_the_size_it_expects",
                "edge_dkm/test_run.py::test_frames_of_another_size_than_the_training_stop_the_line_unless_allowed",
            ),
        ),
        "wrong channels": ("F-SHAPE", (
            f"{INSPECTOR}::test_a_frame_the_graph_cannot_take_says_what_it_is_and_what_was_expected",
            f"{CAPTURE}::test_a_driver_that_gives_grey_pictures_gives_bad_frames",
        )),
        "wrong dtype": ("F-DTYPE", (f"{INSPECTOR}::test_a_frame_the_graph_cannot_take_says_what_it_is_and_what_was_expected",)),
        "16 bits": ("F-DECODE", (f"{HERE}::test_what_is_no_usable_picture_is_named",)),
        "grey as colour, BGR and RGB exchanged": ("no code", (f"{HERE}::test_known_limit_a_grey_file_is_taken_as_colour",)),
        "decompression bomb": ("F-TOO-LARGE", (
            f"{HERE}::test_a_bomb_is_refused_by_its_header_in_the_cameras_process",
            f"{CHECKS}::test_a_frame_that_no_camera_gives_is_too_large",
        )),
        "bomb with short data": ("F-DECODE", (f"{HERE}::test_what_is_no_usable_picture_is_named",)),
        "black": ("F-DARK", (PICTURE, FAILING)),
        "saturated": ("F-BRIGHT", (PICTURE,)),
        "no contrast": ("F-FLAT", (PICTURE,)),
        "colour bars, no-signal card": ("F-FLAT", (PICTURE,)),
        "identical frames": ("F-FROZEN", (FAILING, f"{CHECKS}::test_control_the_same_scene_without_noise_is_frozen")),
        "time repeats or goes back": ("F-STALE", (f"{CHECKS}::test_a_stream_whose_time_repeats_or_goes_back_is_stale",)),
        "too old": ("F-STALE", (f"{CHECKS}::test_a_stream_that_falls_behind_is_stale_until_it_has_caught_up",)),
        "NaN or infinite score": ("R-NONFINITE", (f"{HERE}::test_an_answer_that_is_not_finite_is_no_answer",)),
        "resolution changes": ("C-CHANGED", (FAILING, f"{CAPTURE}::test_frames_that_change_their_size_are_another_camera")),
        "camera swapped, pin_camera": ("no code", (NOT_BUILT,)),
    },
    "Camera": {
        "refused": ("C-REFUSED", (FAILING,)),
        "hang on open": ("C-OPEN-TIMEOUT", (FAILING,)),
        "hang mid-read": ("C-STALL", (FAILING, f"{CAMERAS}::test_a_camera_process_that_dies_or_hangs_is_replaced_and_numbers_go_on")),
        "lost, reset, garbage": ("C-LOST", (FAILING,)),
        "its process crashes": ("C-CRASH", (f"{CAMERAS}::test_a_camera_process_that_dies_or_hangs_is_replaced_and_numbers_go_on",)),
        "auth 401": ("C-AUTH", (FAILING,)),
        "no stream at the address": ("C-OPEN", (f"{HERE}::test_an_address_without_a_stream_is_named_without_its_password",)),
        "no such device": ("C-NODEV", ("devices/test_sources.py::test_a_camera_that_is_not_there_says_what_was_looked_for",)),
        "no such kind": ("C-SPEC", ("devices/test_sources.py::test_a_camera_that_is_not_there_says_what_was_looked_for",)),
        "busy": ("C-OPEN", (NOT_RUN,)),
        "USB drop": ("C-LOST", (NOT_RUN,)),
        "real RTSP": ("C-OPEN", (NOT_RUN,)),
        "GigE packet loss": ("no code", (NOT_BUILT, NOT_RUN)),
        "password masked": ("no code", (
            "devices/test_sources.py::test_passwords_are_masked_in_messages",
            "edge_dkm/test_state_log.py::test_no_password_reaches_the_log",
        )),
        "GPIO": ("no code", (NOT_RUN,)),
    },
    "Config": {
        "unknown key": ("CFG-KEY", (MISTAKE,)),
        "missing key": ("CFG-MISSING", (MISTAKE,)),
        "wrong type": ("CFG-TYPE", (MISTAKE,)),
        "duplicate key": ("CFG-DUPLICATE", (MISTAKE,)),
        "tab": ("CFG-SYNTAX", (MISTAKE, "configs/test_loader.py::test_a_tab_is_named_as_the_cause")),
        "encoding": ("CFG-ENCODING", (MISTAKE,)),
        "missing": ("CFG-FILE", (f"{SETTINGS}::test_a_name_of_no_file_is_refused",)),
        "unreadable": ("CFG-FILE", (f"{SETTINGS}::test_a_file_that_may_not_be_read_is_refused",)),
        "empty": ("CFG-FILE", (MISTAKE,)),
        "1 GB": ("CFG-SIZE", (NO_FILE,)),
        "two cameras of one id": ("CFG-DUPLICATE", (MISTAKE,)),
        "impossible limits": ("CFG-VALUE", (MISTAKE,)),
        "unit": ("CFG-TYPE CFG-KEY", (MISTAKE,)),
        "a number in quotes": ("CFG-TYPE", (f"{HERE}::test_a_number_in_quotes_is_no_number_and_a_wrong_file_changes_nothing",)),
        "host with space or long label": ("CFG-VALUE", (MISTAKE,)),
        "host with NUL": ("CFG-ENCODING", (MISTAKE,)),
        "topic characters": ("CFG-VALUE CFG-ENCODING", (TOPICS, f"{SETTINGS}::test_a_camera_may_not_be_called_what_would_mix_topics")),
        "secret in a readable file": ("CFG-SECRET", (f"{SETTINGS}::test_a_password_that_everybody_may_read_is_a_warning_and_no_error",)),
        "variable not set": ("CFG-ENV", (MISTAKE,)),
        "a start never half-applies": ("CFG-TYPE", (f"{HERE}::test_a_number_in_quotes_is_no_number_and_a_wrong_file_changes_nothing",)),
        "hot reload": ("no code", (NOT_BUILT,)),
        "two processes, one state": ("S-LOCKED", (
            f"{HERE}::test_a_second_line_on_one_state_folder_is_told_who_has_it",
            "edge_dkm/test_run.py::test_a_second_process_on_the_same_state_is_refused_with_the_pid_of_the_first",
        )),
        "one client id twice": ("M-TAKEOVER", (
            f"{FAKE}::test_a_second_station_of_the_name_is_noticed",
            f"{BROKER}::test_two_stations_of_one_name_come_back_once_in_a_pause_and_not_sooner",
        )),
    },
    "Model": {
        "truncated": ("no code", (f"{INSPECTOR}::test_a_truncated_or_edited_model_does_not_load",)),
        "flipped": ("no code", (
            f"{INSPECTOR}::test_a_truncated_or_edited_model_does_not_load",
            f"{INSPECTOR}::test_control_without_its_digest_a_flipped_bit_may_load",
        )),
        "external data": ("no code", (f"{HERE}::test_weights_in_another_file_are_refused_wherever_that_file_lies",)),
        "wrong I/O": ("no code", (f"{INSPECTOR}::test_a_model_whose_outputs_were_changed_is_refused",)),
        "NaN outputs": ("R-NONFINITE", (f"{HERE}::test_an_answer_that_is_not_finite_is_no_answer",)),
        "K mismatch": ("no code", (f"{HERE}::test_a_model_that_names_other_clusters_than_it_has_is_refused",)),
        "opset too new": ("no code", (f"{HERE}::test_an_opset_that_is_too_new_is_named_in_what_the_user_reads",)),
        "empty": ("no code", (NO_MODEL,)),
        "folder": ("no code", (f"{INSPECTOR}::test_a_missing_model_and_a_folder_are_named",)),
        "HTML page": ("no code", (NO_MODEL,)),
        "Git-LFS pointer": ("no code", (NO_MODEL,)),
    },
    "Commands": {
        **{
            entry: (codes, (NO_COMMAND,))
            for entry, codes in {
                "not UTF-8": "CMD-UTF8",
                "not JSON": "CMD-JSON CMD-OBJECT",
                "deep nesting": "CMD-DEPTH",
                "above 16 kB": "CMD-SIZE",
                "duplicate keys": "CMD-DUPLICATE-KEY",
                "unknown verb": "CMD-VERB",
                "missing id": "CMD-ID",
                "expired": "CMD-EXPIRED",
                "future": "CMD-FUTURE",
                "wrong device": "CMD-STATION",
                "int overflow, NaN": "CMD-NUMBER CMD-ARG-VALUE",
                "path in a field": "CMD-ARG-VALUE",
            }.items()
        },
        "wrong device by topic": ("CMD-TOPIC", (f"{COMMANDS}::test_a_topic_of_another_station_is_no_command",)),
        "replayed id": ("CMD-ID-REUSED", (
            f"{COMMANDS}::test_the_same_id_is_answered_again_and_not_done_again",
            f"{COMMANDS}::test_an_id_used_for_another_command_is_told_so",
        )),
        "retained": ("CMD-RETAINED", (f"{COMMANDS}::test_a_retained_command_is_refused_and_says_its_id",)),
        "bounded rate": ("CMD-BUSY", (
            f"{COMMANDS}::test_a_flood_of_garbage_is_counted_and_answered_at_a_bounded_rate",
            f"{COMMANDS}::test_a_slow_command_never_blocks_the_sender_and_too_many_are_told",
        )),
        "no state change": ("no code", ("edge_dkm/test_station.py::test_a_bad_command_is_answered_and_changes_nothing",)),
    },
    "Broker": {
        "v3 only": ("M-V5", (REFUSAL, f"{BROKER}::test_a_broker_of_mqtt_3_alone_is_told_by_its_answer")),
        "max QoS 0": ("M-QOS", (
            f"{BROKER}::test_mosquitto_that_does_not_even_take_our_connect_is_said",
            f"{FAKE}::test_a_broker_that_offers_no_qos_1_is_said_to_be_useless",
        )),
        "no retain": ("no code", (f"{BROKER}::test_mosquitto_that_keeps_no_retained_messages_gets_every_result",)),
        "receive maximum 1": ("no code", (f"{FAKE}::test_the_window_is_what_the_broker_takes",)),
        "packet max 100": ("M-PACKET", (f"{BROKER}::test_a_small_packet_limit_is_reported_and_never_overstepped_on_one_connection",)),
        "server keepalive": ("no code", (f"{BROKER}::test_a_half_open_connection_is_seen_within_seconds_whatever_keepalive_the_broker_sets",)),
        "redirect": ("M-MOVED", (REFUSAL, f"{BROKER}::test_a_broker_that_has_moved_is_quoted_and_not_followed")),
        "0x86, 0x87 at CONNECT": ("M-AUTH", (REFUSAL,)),
        "0x87 at PUBLISH": ("M-DENIED", ("edge_dkm/test_publisher.py::test_a_broker_that_denies_the_topic_keeps_the_rows_and_is_reported",)),
        "nobody subscribes": ("M-NO-CONSUMER", (f"{FAKE}::test_nobody_who_listens_is_no_delivery",)),
        "DNS gone": ("M-DNS", (f"{BROKER}::test_a_host_that_is_not_there_has_its_code",)),
        "nobody listens": ("M-OFFLINE", (f"{BROKER}::test_a_host_that_is_not_there_has_its_code",)),
        "TLS certificate": ("M-TLS-EXPIRED M-TLS-EARLY M-TLS-CA M-TLS-HOST", (CERTIFICATE,)),
        "TLS client": ("M-TLS-CLIENT", (f"{TLS}::test_a_client_certificate_that_the_broker_does_not_trust_is_said",)),
        "TLS to a plain port": ("M-TLS-PLAIN", (f"{TLS}::test_tls_to_a_plain_port_is_an_error_and_never_falls_back",)),
        "plain to a TLS port": ("M-TLS-NEEDED", (f"{TLS}::test_plain_text_to_a_tls_port_says_what_is_missing",)),
    },
    "State": {
        "corrupt": ("S-CORRUPT", (
            f"{STATE}::test_a_damaged_outbox_is_kept_aside_with_an_alarm_and_a_new_epoch_begins",
            f"{STATE}::test_other_damaged_files_are_kept_aside_and_said_and_nothing_is_lost",
        )),
        "one damaged row": ("row_corrupt", (f"{STATE}::test_one_flipped_bit_in_a_result_is_declared_and_the_others_are_delivered",)),
        "locked": ("S-IO", (f"{BOX}::test_a_file_that_another_process_holds_is_not_moved_away",)),
        "read-only DB": ("S-IO", (f"{HERE}::test_an_outbox_of_another_user_is_not_taken_for_a_damaged_one", RESTRICTED)),
        "ENOSPC": ("S-FULL S-DROPPED S-BLOCKED", (
            f"{HERE}::test_what_a_full_outbox_and_a_full_disk_are_called",
            FULL,
            f"{DISK}::test_on_a_full_disk_block_waits_and_drops_nothing",
            RESTRICTED,
        )),
        "EIO": ("S-IO", (f"{BOX}::test_after_an_error_that_leaves_the_disk_in_doubt_it_is_used_no_more_and_checked_at_the_next_start",)),
        "quota": ("S-IO", (f"{HERE}::test_a_limit_of_the_file_size_ends_in_a_clear_line_and_loses_nothing_committed", NOT_RUN)),
        "clock 1970": ("S-CLOCK", (
            f"{HERE}::test_a_clock_that_was_never_set_is_said",
            "faults/test_clock.py::test_a_line_whose_clock_jumps_loses_nothing_and_takes_nothing_for_stuck_or_old",
        )),
        "temporary folder full": ("no code", (f"{HERE}::test_a_full_temporary_folder_stops_nothing",)),
    },
}  # fmt: skip
